#!/usr/bin/env python3
"""Sample images from a trained model, or from Stable Diffusion; see diffusion/commands/sample.py."""

from diffusion.commands.sample import main
from diffusion.config import run_script

if __name__ == "__main__":
    run_script(main)
