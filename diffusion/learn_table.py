"""Learn a sampler's table for one model: the pictures of 60 evaluations in a few.

python -m diffusion.learn_table results/model.pt --steps 6                  results/table_6.json
python sample.py --load_path results/model.pt --sampler results/table_6.json

A table of N rows has 6 N numbers: its levels, and each row's weights of x and of the last four x0.
They start as UniPC's, at the spacing that suits the model, and descend the squared distance to the
teacher's pictures from the same noise, by gradients through the whole loop (arXiv:2305.14502,
arXiv:2405.15506). Images that it did not learn from judge it.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .config import (
    GUIDANCE,
    STEPS,
    Parser,
    add_runtime_arguments,
    command_line,
    model_path,
    run_script,
)
from .data.latents import weights_digest
from .files.sd_files import write_json
from .process.samplers import D0, NOISE, Table, X, Y, one_state
from .process.schedule import NoisePath
from .runtime.distributed import log, progress, setup
from .runtime.seeding import permutation
from .sampling.load import load

TEACHER = ("unipc2", 60)  # the nearest to 240 evaluations
SEED = 1_000_000  # its first TAUGHT images teach, the others judge
STARTS = ("flow", "logsnr", "trailing", "consistency")  # spacings
TAUGHT = 64
JUDGED = 32
BATCH = 8
EPOCHS = 30
RATE = 0.02  # of Adam


def with_one_state(table: Table) -> Table:
    """Make the same table with one state, of one like UniPC's: x is y but for the history.

    Row i leaves y' = k x' + rest . (d0, d1, ...), so that in the next one x = (y - rest . (d1, ...)) / k.
    """
    rows = table.to_y.clone()
    for row, a, b in zip(rows[1:], table.to_x, table.to_y):
        k = (b[X] + b[Y]) / (a[X] + a[Y])
        rest = (b - k * a)[D0 : NOISE - 1]
        row[D0 + 1 : NOISE] -= row[X] / k * rest
        row[X] /= k
    rows[:, X] += rows[:, Y]
    rows[:, Y] = 0
    return replace(table, to_x=rows, to_y=rows)


def euler(levels: Tensor) -> Tensor:
    """Make the rows (N, 7) of DDIM, with gradients also where a step ends at sigma = 0."""
    alpha_t, sigma_t = levels[:-1].T
    alpha_s, sigma_s = levels[1:].T
    k_x = sigma_s / sigma_t
    return one_state(k_x, alpha_s - k_x * alpha_t, 0.0).to_x


def learn(student, targets: Tensor, start: Table, path: NoisePath, batches) -> Table:
    """Move the levels and weights of a table so that the student ends at the targets (M, ...).

    student: (table, indices) -> where the loop ends from these noises, with gradients. batches: of
    indices, one a step. start: of one state, without noise, with x0 in the history.
    What is learned is half the log-SNR of each row, and what is added to DDIM's row between these
    levels: weights of eps, x0 and the differences of past x0, which are nearly alike: in their
    differences the weights can be learned one by one.
    """
    lam = (start.levels[:-1, 0] / start.levels[:-1, 1]).log().requires_grad_()
    known = start.to_x - euler(start.levels)
    # a hair more than 0: no column is dropped
    weights = torch.full((len(start), 5), 1e-9).double().requires_grad_()

    def table() -> Table:
        t = path.nearest_t(lam)
        levels = torch.cat([torch.stack(path.at(t), 1), start.levels[-1:]])
        alpha, sigma = levels[:-1].T
        k_eps, k_x0, c1, c2, c3 = weights.T / 10
        k_x = k_eps / sigma
        k_x0 = k_x0 - k_x * alpha + c1
        more = torch.stack([k_x, 0 * k_x, k_x0, c2 - c1, c3 - c2, -c3, 0 * k_x], 1)
        rows = euler(levels) + known + more
        return replace(start, t=t, levels=levels, to_x=rows, to_y=rows)

    optimizer = torch.optim.Adam([lam, weights], RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        (student(table(), batch) - targets[batch]).square().mean().backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        return table()


def main() -> None:
    parser = Parser(prog="python -m diffusion.learn_table", description=__doc__)
    # fmt: off
    parser.add_argument("model", type=model_path, metavar="MODEL", help="model.pt or ema.safetensors of the model, or the folder of its run")
    parser.option("--steps N", "number of network evaluations per image", STEPS, default=6)
    parser.option("--guidance_scale X", "guidance scale, which the table then always has; classes take turns", GUIDANCE, default=1.0)
    parser.option("--save FILE", "file of the table (default: table_N.json beside the model)")
    # fmt: on
    add_runtime_arguments(parser)
    args = parser.parse_args()
    parser.check(args)
    pipeline = load(args.model, args.weights, setup(args.device))

    def end(table: Table, indices) -> Tensor:
        given = dict(guidance_scale=args.guidance_scale, amp=args.amp, seed=SEED)
        given["labels"] = pipeline.labels_in_turn(indices)
        *_, (x, _) = pipeline.frames(indices, table=table, **given)
        return x

    def ends(table: Table, low: int, high: int) -> Tensor:
        batches = [range(i, i + BATCH) for i in range(low, high, BATCH)]
        return torch.cat([end(table, batch) for batch in progress(batches, leave=False)])

    def psnr(table: Table, low: int = TAUGHT, high: int = TAUGHT + JUDGED) -> float:
        error = ends(table, low, high) - targets[low:high]
        return 10 * (4 / error.square().mean()).log10().item()

    targets = ends(pipeline.table(*TEACHER), 0, TAUGHT + JUDGED)
    made = [pipeline.table("unipc2", args.steps, spacing) for spacing in STARTS]
    start = with_one_state(max(made, key=lambda table: psnr(table, 0, BATCH)))
    orders = [permutation(TAUGHT, SEED, epoch).tolist() for epoch in range(EPOCHS)]
    batches = [order[i : i + BATCH] for order in orders for i in range(0, TAUGHT, BATCH)]
    table = learn(end, targets, start, pipeline.schedule, progress(batches))
    table = table.guided(args.guidance_scale)
    about = dict(teacher=TEACHER, seed=SEED, psnr_before=psnr(start), psnr=psnr(table))
    rows = torch.column_stack([table.t, table.levels[:-1], table.weight, table.to_x])
    digest = weights_digest(pipeline.model)
    place = Path() if args.model.startswith("hf:") else Path(args.model).parent
    file = Path(args.save or place / f"table_{args.steps}.json")
    write_json(file, dict(model=digest, taught_by=about, rows=rows.tolist()))
    log(f"{file}: {about}")
    raw = "raw" if args.weights == "raw" else None
    log(f"next: {command_line('sample', load_path=args.model, weights=raw, sampler=file)}")


if __name__ == "__main__":
    run_script(main)
