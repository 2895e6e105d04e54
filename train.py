#!/usr/bin/env python3
"""Train a diffusion model; see diffusion/commands/train.py."""

from diffusion.commands.train import command

if __name__ == "__main__":
    command()
