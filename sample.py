#!/usr/bin/env python3
"""Sample images from a trained model, or from Stable Diffusion; see diffusion/commands/sample.py."""

from diffusion.commands.sample import command

if __name__ == "__main__":
    command()
