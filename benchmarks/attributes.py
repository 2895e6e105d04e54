#!/usr/bin/env python3
"""How often a text-to-image model of toy faces draws the hair and background that it was asked for.

python benchmarks/attributes.py --load_path results/sd_tiny/model.pt --num_prompts 200

Prompts are captions of faces that were not drawn for training; colours are read from the pixels
(read_colours), which is checked on drawn faces first. JSON comes last.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion.data import toy  # noqa: E402
from diffusion.pictures.grid import save_png, strip, to_uint8  # noqa: E402
from diffusion.sampling.load import open_pipeline  # noqa: E402


def faces(count: int) -> list[int]:
    """Numbers beyond the training set, of faces with hair."""
    found, i = [], toy.COUNT
    while len(found) < count:
        if toy.attributes(i)["hair"]:
            found.append(i)
        i += 1
    return found


def read_colours(image: np.ndarray) -> tuple[str, str]:
    """Read (hair, background) off a face (size, size, 3) uint8 that is not bald: nearest colours.

    They are read above the forehead and in the upper corners, so that drawn and generated faces
    can be scored alike.
    """
    size = len(image)

    def nearest(palette: dict, *boxes) -> str:
        parts = [
            image[round(y0 * size) : round(y1 * size), round(x0 * size) : round(x1 * size)]
            for x0, x1, y0, y1 in boxes
        ]
        colour = np.median(np.concatenate([p.reshape(-1, 3) for p in parts]), 0)
        return min(palette, key=lambda name: np.abs(colour - palette[name]).sum())

    hair = nearest(toy.HAIR, (0.44, 0.56, 0.23, 0.29))
    return hair, nearest(toy.BACKGROUND, (0.02, 0.1, 0.02, 0.1), (0.9, 0.98, 0.02, 0.1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load_path", default="results/sd_tiny/model.pt")
    parser.add_argument("--num_prompts", type=int, default=200)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--save", default=None, help="PNG with the first 16 and their prompts' faces"
    )
    args = parser.parse_args()
    pipeline = open_pipeline(args.load_path, None, "ema", torch.device("cpu"))
    indices, size = faces(args.num_prompts), pipeline.config.image_size
    drawn = [toy.draw(i, size) for i in indices]
    wanted = [(toy.attributes(i)["hair"], toy.attributes(i)["background"]) for i in indices]
    began, made = time.perf_counter(), []
    for low in range(0, len(indices), 20):
        part = range(low, min(low + 20, len(indices)))
        prompts = [toy.caption(indices[i]) for i in part]
        options = {"prompts": prompts, "guidance_scale": args.guidance_scale}
        images = pipeline.sample(part, sampler=args.sampler, steps=args.steps, **options)
        made.extend(to_uint8(images))
    result = {"bench": "attributes", "load_path": args.load_path, "num_prompts": len(indices),
              "guidance_scale": args.guidance_scale, "sampler": args.sampler, "steps": args.steps,
              "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip
    for name, pictures in (("drawn", drawn), ("generated", made)):
        read = [read_colours(picture) for picture in pictures]
        hair = [a[0] == b[0] for a, b in zip(read, wanted)]
        background = [a[1] == b[1] for a, b in zip(read, wanted)]
        both = [h and b for h, b in zip(hair, background)]
        result[name] = {k: sum(v) / len(v) for k, v in
                        {"hair": hair, "background": background, "both": both}.items()}  # fmt: skip
        print(f"{name:>10}: " + ", ".join(f"{k} {v:.1%}" for k, v in result[name].items()))
    if args.save:
        rows = np.stack([np.stack(drawn[:8]), np.stack(made[:8])])
        labels = [" ".join(pair) for pair in wanted[:8]]
        save_png(strip(rows, labels, "asked for; generated"), Path(args.save))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
