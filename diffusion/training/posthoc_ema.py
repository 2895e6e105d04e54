"""Make an EMA of any length after training, of the snapshots of train.py --posthoc_ema.

python -m diffusion.training.posthoc_ema results --sigma_rel 0.07     results/ema_0.070.safetensors
python -m diffusion.training.posthoc_ema results --best               of the best length

The length is relative: the average after step t weighs the weights of step s by a power of s, and
0.07 means that these weights, its profile, have a standard deviation of 0.07 t. The file is used
like the run's own ema.safetensors.

    averages/step_00000500.safetensors     in a run: both of its averages at that step, in float16

The sum of snapshots whose profiles add up most nearly to another profile is nearly the average of
that profile (arXiv:2312.02696, section 3.2).
"""

from pathlib import Path

import torch
from torch import Tensor

from .. import UserError
from ..config import Config, Parser, between, command_line, run_script
from ..files.checkpoint import load_weights, save_weights, step_files
from ..runtime.distributed import log, setup
from .ema import EMA, TRACKS, power
from .finetune_config import open_base
from .recipe import heldout_loss, open_recipe
from .run_folder import made_here

FILES = "averages/step_*.safetensors"
KEPT = 32  # files
GRID = (0.03, 0.05, 0.07, 0.1, 0.14, 0.2)
FEWEST = 16  # of fewer, an average of 0.03 or 0.2 is wrong by more than 1 %
COMMON = 1e6  # of all weights, next to their changes


def step_of(file: Path) -> int:
    return int(file.stem[5:])


def keep(folder: Path, step: int, config: Config, tracks: list[EMA]) -> None:
    """Write a snapshot of the averages, and thin the files out to KEPT, evenly.

    That file goes which leaves the least gap, of equals the first; the newest stays.
    """
    rows = zip(tracks[0].names, *(track.ema for track in tracks))
    values = {name: torch.stack(pair).half() for name, *pair in rows}
    path = folder / FILES.replace("*", f"{step:08d}")
    save_weights(path, values, config, step=step, classes=[])
    files = step_files(folder, FILES)[::-1]
    while len(files) > KEPT:
        steps = [0, *map(step_of, files)]
        gaps = [after - before for before, after in zip(steps, steps[2:])]
        files.pop(gaps.index(min(gaps))).unlink()


def solve(steps: list[int], sigma_rel: float) -> Tensor:
    """Give (N, 2) float64 coefficients of the snapshots of N steps, the newest first.

    Their profile is the nearest to that of sigma_rel at the newest step, by the integral of the
    squared difference. What the weights have in common changes nothing: the coefficients add up
    to 1 as nearly as a share of COMMON in all profiles makes them.
    """
    ends = [(step / steps[0], power(length)) for step in steps for length in TRACKS]
    t, p = torch.tensor([*ends, (1, power(sigma_rel))], dtype=torch.float64).T
    # integrals of products of the profiles p s^(p-1) / t^p
    both = p[:, None] + p - 1
    heights = p / t**p
    changes = torch.minimum(t[:, None], t) ** both / both * torch.outer(heights, heights)
    products = changes + COMMON
    return torch.linalg.solve(products[:-1, :-1], products[:-1, -1]).view(-1, 2)


def main() -> None:
    parser = Parser(prog="python -m diffusion.training.posthoc_ema", description=__doc__)
    # fmt: off
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.target = parser.add_mutually_exclusive_group(required=True)
    parser.option("--sigma_rel X", "relative length of the average", between(0.03, 0.2))
    parser.option("--best", "the length of the lowest held-out loss, of six from 0.03 to 0.2")
    # fmt: on
    args = parser.parse_args()
    parser.check(args)
    folder = args.run
    weights, config, about = load_weights(folder / "model.pt")
    config = made_here(folder) or config  # which knows where all things are
    files = step_files(folder, FILES)
    if len(files) < FEWEST:
        raise UserError(
            f"{folder} holds {len(files)} snapshots, and {FEWEST} are needed: train with "
            "--posthoc_ema, and with a --save_and_sample_every that gives as many"
        )
    steps = [*map(step_of, files)]

    def average(length: float) -> dict[str, Tensor]:
        """Add up the snapshots. Raises UserError for one of another run."""
        sums = {}
        for file, row in zip(files, solve(steps, length).float()):
            values, other, _ = load_weights(file)
            if config.differences(other):
                raise UserError(f"{file} is of another run than model.pt; move it elsewhere")
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + torch.tensordot(row, value.float(), 1)
        return weights | sums

    def loss(length: float) -> float:
        model.load_state_dict(average(length))
        value = heldout_loss(recipe, model, config.batch_size // config.grad_accum)
        log(f"sigma_rel {length}: held-out loss {value:.5f}")
        return value

    best = args.sigma_rel
    if args.best:
        device = setup(config.device)
        recipe = open_recipe(config, device, open_base(config) if config.adapts else None)
        if not len(recipe.batches.held_out):
            raise UserError("--best: the run has no held-out images; give --sigma_rel X")
        model = recipe.build().to(device).eval()
        best = min(GRID, key=loss)
    file = folder / f"ema_{best:.3f}.safetensors"
    save_weights(file, average(best), config, **about | {"step": steps[0]})
    log(f"{file}: the average of sigma_rel {best} at step {steps[0]}")
    log(f"next: {command_line('sample', load_path=file)}")


if __name__ == "__main__":
    run_script(main)
