#!/usr/bin/env python3
"""Images a second into the training step: ours against torchvision's and lucidrains' loaders.

python benchmarks/loader.py FOLDER [--size 64] [--batch_size 32] [--workers 2]

From image files to float32 batches in [-1, 1] on the device, mirrored at random. Epoch 1 decodes
(ours builds its cache), epoch 2 does not have to. Peers: ImageFolder + DataLoader with the usual
transforms, and denoising-diffusion-pytorch's Dataset + DataLoader. Each side has a process of its
own; they take turns within an epoch's batches. A ratio above 1 means that ours is faster. Peers
need pip install denoising-diffusion-pytorch. The last line is JSON.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import common
import torch

sys.path.insert(0, str(common.ROOT))

from diffusion.config import Config  # noqa: E402
from diffusion.data.batches import open_batches, to_unit  # noqa: E402
from diffusion.runtime.distributed import setup  # noqa: E402


def ours(args, cache_dir: str):
    """A call that goes through an epoch."""
    device = setup(args.device)
    config = Config(data=args.folder, image_size=args.size, batch_size=args.batch_size,
                    num_workers=args.workers, cache_dir=cache_dir)  # fmt: skip
    state = {"step": 0, "data": None}

    def epoch() -> None:
        state["data"] = data = state["data"] or open_batches(config)  # the first time: the cache
        for _ in range(data.length // args.batch_size):
            step = state["step"]
            batch = data(step, 0, args.batch_size, (step + 1, 0, args.batch_size))
            to_unit(batch.pixels, device).sum()
            state["step"] += 1

    return epoch


def through(args, dataset):
    loader = torch.utils.data.DataLoader(
        dataset, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True,
        persistent_workers=args.workers > 0, pin_memory=args.device == "cuda",
    )  # fmt: skip

    def epoch() -> None:
        for batch in loader:
            batch = batch[0] if isinstance(batch, list) else batch
            batch.to(args.device, non_blocking=True).sum()

    return epoch


def torchvision(args, root: str):
    from torchvision import datasets
    from torchvision import transforms as T

    steps = [T.Resize(args.size), T.CenterCrop(args.size), T.RandomHorizontalFlip(), T.ToTensor(),
             T.Normalize([0.5] * 3, [0.5] * 3)]  # fmt: skip
    return through(args, datasets.ImageFolder(root, T.Compose(steps)))


def lucidrains(args):
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Dataset

    return through(args, Dataset(args.folder, args.size, augment_horizontal_flip=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="of images")
    common.add_device(parser)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    device = torch.device(args.device)
    files = len(list(Path(args.folder).glob("*.*")))
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "classes").mkdir()
        (Path(temporary) / "classes" / "all").symlink_to(Path(args.folder).resolve())
        sides = {"ours": partial(ours, args, temporary),
                 "torchvision": partial(torchvision, args, f"{temporary}/classes"),
                 "lucidrains": partial(lucidrains, args)}  # fmt: skip
        times, memory = common.in_turn(sides, device, args.repeats, warm_up=0, median=False)
    rate, ratio = {}, {}
    for epoch, pick in (("1", lambda t: t[0]), ("2", lambda t: common.statistics.median(t[1:]))):
        seconds = {name: pick(t) for name, t in times.items()}
        rate[epoch] = {name: files / s for name, s in seconds.items()}
        ratio[epoch] = {n: s / seconds["ours"] for n, s in seconds.items() if n != "ours"}
        for name, s in seconds.items():
            print(f"epoch {epoch}, {name:>12}: {files / s:9.0f} img/s, {memory[name] / 2**20:.0f} "
                  f"MiB; ours / this {s / seconds['ours']:.2f}")  # fmt: skip
    common.report("loader", device, {
        "files": files, "size": args.size, "batch_size": args.batch_size, "workers": args.workers,
        "images_per_second": rate, "memory_bytes": memory, "ratio": ratio,
    })  # fmt: skip


if __name__ == "__main__":
    main()
