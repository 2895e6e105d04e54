#!/usr/bin/env python3
"""Train a diffusion model; see diffusion/commands/train.py."""

from diffusion.commands.train import main
from diffusion.config import run_script

if __name__ == "__main__":
    run_script(main)
