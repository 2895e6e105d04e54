"""Run files/sd_export.py: `python -m diffusion.export results/model.pt my-model`."""

from .config import run_script
from .files.sd_export import main

if __name__ == "__main__":
    run_script(main)
