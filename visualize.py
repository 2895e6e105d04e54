#!/usr/bin/env python3
"""Draw the forward and the reverse process of a model; see diffusion/commands/visualize.py."""

from diffusion.commands.visualize import main
from diffusion.config import run_script

if __name__ == "__main__":
    run_script(main)
