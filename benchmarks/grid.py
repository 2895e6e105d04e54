"""Train and sample every combination of some options: which recipe gives the best pictures?

python benchmarks/grid.py path=vp,edm,flow objective=eps,x0,v,flow \\
    --train "--preset afhq_cat32 --data FOLDER --train_steps 400" --sample "--steps 10" \\
    --real FOLDER --features FEATURES.pt --out FILE.json

Axes are options of train.py or sample.py, without their dashes: NAME=VALUE,VALUE. What only the
sampling differs in is trained once. Prints a line for each cell and, at the end, a table of their
medians over the seeds, best first: Fréchet distances to --real in the features of a TorchScript
network (of the tests, or Inception without --features). {run} in a value is the folder of the run, as in
guide={run}/checkpoints/step_00000250.pt; values of an axis that contain commas cannot be given.

Each of --jobs processes computes on one thread. A cell that --out already holds is not run again.
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import common
import torch

sys.path.insert(0, str(common.ROOT))

from diffusion.commands.sample import parse as parse_sample
from diffusion.config import Config
from diffusion.evaluation.distances import frechet_distance
from diffusion.evaluation.features import open_features

TRAIN = {field.name for field in fields(Config)} | {"preset"}


def product_of(axes: list[str], known) -> list[dict]:
    """[{name: value}] of all combinations of the axes whose names are known."""
    pairs = [axis.split("=", 1) for axis in axes]
    names = [name for name, _ in pairs if name in known]
    values = [values.split(",") for name, values in pairs if name in known]
    return [dict(zip(names, cell)) for cell in itertools.product(*values)]


def options_of(cell: dict) -> list[str]:
    """As they are typed; an option without a value, NAME=on, stands alone, NAME=off is left out."""
    options = []
    for name, value in cell.items():
        options += [] if value == "off" else [f"--{name}"]
        options += [value] if value not in ("on", "off") else []
    return options


class Grid:
    """Runs cells; found: what is known of them, kept in --out."""

    def __init__(self, args):
        self.args = args
        self.lock = threading.Lock()
        self.features = open_features(args.features, torch.device("cpu"))
        self.real = self.moments(Path(args.real))
        self.found = []
        if args.out.exists():
            self.found = json.loads(args.out.read_text())["found"]

    def moments(self, folder: Path):
        return common.moments_of(folder, self.features, self.args.image_size)

    def keep(self, **found) -> None:
        with self.lock:
            self.found.append(found)
            content = vars(self.args) | {"commit": common.commit(), "found": self.found}
            self.args.out.write_text(json.dumps(content, indent=1, default=str))
            done = f"{found['distance']:.4g}" if "distance" in found else found["error"]
            print(found["seed"], *options_of(found["cell"]), f"-> {done}", flush=True)

    def known(self, cell: dict, seed: int) -> bool:
        return any(f["cell"] == cell and f["seed"] == seed for f in self.found)

    def __call__(self, trained: dict, sampled: list[dict], seed: int) -> None:
        """Train a cell, unless its run is finished, and sample it in each way."""
        waiting = [cell for cell in sampled if not self.known(trained | cell, seed)]
        name = "_".join([*(f"{k}={v}" for k, v in trained.items()), f"seed={seed}"])
        folder = self.args.save_folder / name.replace("/", "-")
        own = ["--save_folder", str(folder), "--seed", str(seed)]
        try:
            if waiting:
                options = shlex.split(self.args.train) + options_of(trained)
                seconds = common.run_script("train.py", options + own, folder / "train.log", 1)
        except RuntimeError as error:
            self.keep(cell=trained, seed=seed, error=str(error))
            return
        for i, cell in enumerate(waiting):
            out = folder / f"samples_{i}_{time.time_ns()}"
            options = [o.replace("{run}", str(folder)) for o in options_of(cell)]
            options += ["--num_images", str(self.args.images), "--seed", str(seed)]
            options += ["--load_path", str(folder / "model.pt"), "--save_folder", str(out)]
            try:
                took = common.run_script(
                    "sample.py", shlex.split(self.args.sample) + options, out / "log", 1
                )
                distance = frechet_distance(*self.moments(out / "images"), *self.real)
            except RuntimeError as error:
                self.keep(cell=trained | cell, seed=seed, error=str(error))
                continue
            self.keep(
                cell=trained | cell, seed=seed, distance=round(distance, 3),
                train_seconds=round(seconds, 1), sample_seconds=round(took, 1),
            )  # fmt: skip


def table(found: list[dict]) -> str:
    """The medians, best first; then what failed."""
    cells = {}
    for one in found:
        if "distance" in one:
            cells.setdefault(" ".join(options_of(one["cell"])), []).append(one["distance"])
    rows = sorted(cells.items(), key=lambda row: statistics.median(row[1]))
    lines = ["| cell | median | each seed |", "| --- | --- | --- |"]
    for name, values in rows:
        each = ", ".join(f"{value:.4g}" for value in values)
        lines.append(f"| {name} | {statistics.median(values):.4g} | {each} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("axes", nargs="+", metavar="NAME=VALUE,...")
    parser.add_argument("--train", default="", help="options of train.py that all cells share")
    parser.add_argument("--sample", default="", help="options of sample.py that all cells share")
    parser.add_argument("--real", required=True, help="folder of real images")
    parser.add_argument("--features", help="TorchScript network (default: Inception)")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--images", type=int, default=500, help="to be sampled of each cell")
    parser.add_argument("--seeds", default="1", help="of training and of the noise: 1,2,3")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--save_folder", type=Path, default=Path("results/grid"))
    parser.add_argument("--out", type=Path, default=Path("results/grid.json"))
    args = parser.parse_args()
    sampling = vars(parse_sample([])).keys() - TRAIN | {"sampler", "guide", "guidance_scale"}
    for axis in args.axes:
        name, equals, _ = axis.partition("=")
        if not equals or name not in TRAIN | sampling:
            parser.error(f"{axis}: NAME=VALUE,... with an option of train.py or sample.py")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    grid = Grid(args)
    torch.set_num_threads(1)
    trained = product_of(args.axes, TRAIN - sampling)
    sampled = product_of(args.axes, sampling)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: grid(job[1], sampled, job[0]), itertools.product(seeds, trained)))
    print(table(grid.found))


if __name__ == "__main__":
    main()
