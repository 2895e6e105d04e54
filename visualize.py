#!/usr/bin/env python3
"""Draw the forward and the reverse process of a model; see diffusion/commands/visualize.py."""

from diffusion.commands.visualize import command

if __name__ == "__main__":
    command()
