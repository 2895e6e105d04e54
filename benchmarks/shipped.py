#!/usr/bin/env python3
"""Write the model that comes with the package, diffusion/shipped/toy_faces.safetensors.

python train.py && python benchmarks/shipped.py results/ema.safetensors

It is the EMA weights of the default run, rounded to float16. What it costs to train and how good it
is: the ledger's rows `shipped` and `toy_whole`.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT))

from diffusion.config import DEFAULTS  # noqa: E402
from diffusion.files.checkpoint import load_weights, save_weights  # noqa: E402
from diffusion.sampling.load import SHIPPED  # noqa: E402


def write(source: Path, target: Path) -> None:
    """Write the shared file `source` again in float16, without what is its machine's own."""
    weights, config, metadata = load_weights(source)
    half = {name: tensor.half() for name, tensor in weights.items()}
    places = {name: DEFAULTS[name] for name in ("save_folder", "cache_dir", "device")}
    save_weights(target, half, dataclasses.replace(config, **places), **metadata)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="ema.safetensors of the default run")
    parser.add_argument("target", type=Path, nargs="?", default=SHIPPED)
    args = parser.parse_args()
    write(args.source, args.target)
    print(f"{args.target}: {args.target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
