"""Run metrics.py: `python -m diffusion.evaluation`."""

from ..config import run_script
from .metrics import main

if __name__ == "__main__":
    run_script(main)
