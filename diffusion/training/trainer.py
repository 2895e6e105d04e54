"""The training loop. One for every mode: modes differ in the batches that come in, in what is
trained and in what decodes the result, not here.

`step` is an optimizer step, `batch_size` counts the samples of a step over all ranks and
micro-batches. What sample j of step s sees (t, noise, flip, hidden condition) depends on
(seed, s, j) only.
"""

import math
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import UserError
from .. import distributed as dist
from ..config import Config
from ..data.batches import Batch, open_batches, to_unit
from ..evaluation.viz import grid, to_uint8
from ..pipeline import Pipeline, amp_dtype, build_model
from ..process.gaussian import training_loss
from ..process.schedule import make_schedule
from ..seeding import generator, seed_of
from ..weights import checkpoint
from .ema import EMA
from .run import RunLog, claim, resume

MOST_BAD_STEPS = 10  # non-finite steps in a row that end a run


def train(config: Config) -> None:
    """Train, or go on training, as the configuration says. Raises UserError for mistakes in it."""
    device = dist.setup(config.device)
    dtype = amp_dtype(config.amp, device)
    share = rank_share(config)
    folder = Path(config.save_folder)
    lock = claim(folder)  # noqa: F841 - held until the end of the run

    # the parts
    config, state = resume(config, folder)
    data = open_batches(config)
    check_data(state, data, config)
    total = total_steps(config, data.length)
    if state is not None and state["step"] >= total:
        dist.log(f"{folder} holds a finished run of {state['step']} steps; more --train_steps "
                 "would continue it, --overwrite start anew")  # fmt: skip
        return
    torch.manual_seed(seed_of(config.seed, "init"))
    model = build_model(config, len(data.classes)).to(device)
    schedule = make_schedule(config.schedule, config.time_steps, config.zero_snr)
    if state is None and config.load_path is not None:
        start_from(model, Path(config.load_path))
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, betas=(0.9, 0.99),
                                  weight_decay=config.weight_decay, fused=True)  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    ema = EMA(model, config.ema_decay)
    tally = Tally(device)
    step = 0

    # resume
    if state is not None:
        step = state["step"]
        model.load_state_dict(state["model"])
        ema.model.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        tally.sums.copy_(state["tally"])
        data.length = state["data"]["length"]
        dist.log(f"continuing the run in {folder} from step {step}")
    best = state["best_loss"] if state is not None else None
    del state
    if config.compile:
        model.compile()
    parallel = dist.wrap(model)
    run = RunLog(folder, config, step)
    sampler = Pipeline(config, ema.model, schedule, data.classes, device)
    announce(config, model, data, device, dtype, share, total)

    def save() -> None:
        if dist.is_main():
            checkpoint.save(folder, {
                "step": step, "samples_seen": step * config.batch_size, "best_loss": best,
                "config": asdict(config), "classes": list(data.classes),
                "data": {"order": data.order_key(), "length": data.length},
                "model": model.state_dict(), "ema": ema.model.state_dict(),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "tally": tally.sums.cpu(),
            }, config.keep_last)  # fmt: skip

    stop = StopSignal()
    bar = dist.progress(total=total, initial=step, unit="step")
    clock = Clock(step)
    while step < total:
        # the random numbers of this step's whole batch, of which this rank takes its share
        t, eps, hidden = draw(config, step, len(schedule), device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, total)
        if config.dropout:
            torch.manual_seed(seed_of(config.seed, "dropout", step, dist.rank()))

        # forward, backward
        pieces = share.pieces(dist.rank())
        for i, (low, high) in enumerate(pieces):
            more = i + 1 < len(pieces)
            then = (step, *pieces[i + 1]) if more else (step + 1, *pieces[0])
            batch = data(step, low, high, then if more or step + 1 < total else None)
            cond = condition(config, batch, hidden[low:high], model, device)
            with dist.no_sync(parallel, more):
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss = training_loss(
                        parallel, schedule, config.objective, to_unit(batch.pixels, device),
                        t[low:high], eps[low:high], cond, config.loss, config.min_snr_gamma,
                    ).mean() / len(pieces)  # fmt: skip
                scaler.scale(loss).backward()
            tally.add_loss(loss)

        # update; a non-finite gradient is the same on all ranks, and changes nothing
        scaler.unscale_(optimizer)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        ok = torch.isfinite(norm)
        if config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
        optimizer.found_inf = (~ok).float()  # read by the fused kernel, on the device
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step, ok)
        tally.add_step(norm, ok)
        step += 1
        bar.update()

        # log, save, sample
        milestone = step % config.save_and_sample_every == 0 or step == total
        if milestone or step % config.log_every == 0:
            values = tally.read() | {"lr": learning_rate(config, step - 1, total)}
            if values.pop("worst_streak") >= MOST_BAD_STEPS:
                raise UserError(
                    f"{MOST_BAD_STEPS} steps in a row before step {step} had non-finite gradients; "
                    f"the checkpoints in {folder} are from before. Try a lower --learning_rate, "
                    "--amp no, or --grad_clip 1"
                )
            values["img_per_s"] = clock.rate(step) * config.batch_size
            if milestone and len(data.held_out):
                values["heldout_loss"] = heldout_loss(config, sampler, data, share.micro)
            run.metrics(step, values)
            bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['img_per_s']:.0f} img/s", refresh=False)
        if milestone:
            loss = values.get("heldout_loss")
            improved = loss is not None and (best is None or loss < best)
            best = loss if improved else best
            save()
            if dist.is_main():
                write_weights(folder, config, ema, data, step, best, improved)
            if config.num_samples:
                sheet = sample_grid(config, sampler)
                if sheet is not None:
                    run.picture(step, sheet)
            clock.skip(step)

        # stop
        if dist.any_rank(stop.requested) and step < total:
            save()
            dist.log(f"stopped at step {step}; the same command goes on from there")
            break

    bar.close()
    run.close()
    stop.restore()
    if step == total:
        dist.log(f"done: {folder / 'model.pt'}; python sample.py --load_path {folder / 'model.pt'}")


# --- parts of a step ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """How a batch is split: `ranks` times `accum` pieces of `micro` samples."""

    ranks: int
    accum: int
    micro: int

    def pieces(self, rank: int) -> list[tuple[int, int]]:
        first = rank * self.accum
        return [(i * self.micro, (i + 1) * self.micro) for i in range(first, first + self.accum)]


def rank_share(config: Config) -> Share:
    """Raises UserError if the batch does not divide, naming the nearest sizes that do."""
    ranks, B = dist.world_size(), config.batch_size
    parts = ranks * config.grad_accum
    if B % parts:
        below = B // parts * parts
        sizes = f"{below} or {below + parts}" if below else f"{parts}"
        raise UserError(f"batch_size {B} does not divide by {ranks} ranks x {config.grad_accum} "
                        f"micro-batches; the nearest that do: {sizes}")  # fmt: skip
    return Share(ranks, config.grad_accum, B // parts)


def draw(config: Config, step: int, T: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """t (B,) int64, eps (B, 3, H, W) and which conditions to hide (B,) bool, for a global batch."""
    B, size = config.batch_size, config.image_size
    t = torch.randint(T, (B,), generator=generator(config.seed, "t", step))
    hidden = torch.rand(B, generator=generator(config.seed, "hide", step)) < config.condition_dropout
    g = generator(config.seed, "noise", step, device=device)
    eps = torch.randn((B, 3, size, size), generator=g, device=device)
    return t, eps.contiguous(memory_format=torch.channels_last), hidden


def condition(config: Config, batch: Batch, hidden: Tensor, model, device) -> Tensor | None:
    """What the network is told: None, or labels of which the hidden ones are the null label."""
    if config.condition == "none":
        return None
    return batch.labels.masked_fill(hidden, model.null_label).to(device, non_blocking=True)


def learning_rate(config: Config, step: int, total: int) -> float:
    """Of the update that leads from `step` to step + 1: warm-up, then the schedule down to 0."""
    warmup = min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    left = 1 - max(0, step - config.lr_warmup_steps) / max(1, total - config.lr_warmup_steps)
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return config.learning_rate * warmup * shape[config.lr_schedule]


def total_steps(config: Config, epoch_length: int | None) -> int:
    if config.epochs is None:
        return config.train_steps
    if epoch_length is None:
        raise UserError("a stream's length is not known: give --train_steps instead of --epochs")
    return math.ceil(config.epochs * epoch_length / config.batch_size)


class Tally:
    """Sums since the last log line, on the device: nothing is read until a line is written.

    sums: loss, steps, norm of the last gradient, skipped steps in all, bad streak, worst streak.
    """

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(6, dtype=torch.float64 if device.type != "mps" else torch.float32,
                                device=device)  # fmt: skip

    def add_loss(self, loss: Tensor) -> None:
        self.sums[0] += loss.detach()

    def add_step(self, norm: Tensor, ok: Tensor) -> None:
        bad = ~ok
        self.sums[1] += 1
        self.sums[2] = norm
        self.sums[3] += bad
        self.sums[4] = (self.sums[4] + 1) * bad
        self.sums[5] = torch.maximum(self.sums[5], self.sums[4])

    def read(self) -> dict[str, float]:
        """The means over ranks and steps; the sums start again."""
        loss = dist.all_reduce_sum(self.sums[0].clone()) / dist.world_size()
        total, steps, norm, skipped, _, worst = [float(loss), *self.sums[1:].tolist()]
        self.sums[:2] = 0
        self.sums[5] = 0
        return {"loss": total / max(1, steps), "grad_norm": norm, "skipped": int(skipped),
                "worst_streak": int(worst)}  # fmt: skip


class Clock:
    """Steps a second of training proper: saving and sampling do not count."""

    def __init__(self, step: int):
        self.skip(step)

    def skip(self, step: int) -> None:
        self.step, self.time = step, time.perf_counter()

    def rate(self, step: int) -> float:
        steps, seconds = step - self.step, time.perf_counter() - self.time
        self.skip(step)
        return steps / seconds


class StopSignal:
    """SIGINT and SIGTERM ask for a stop after the step; a second SIGINT stops at once."""

    def __init__(self):
        self.requested, self.alone = False, dist.world_size() == 1
        self.old = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, _frame) -> None:
        # torchrun passes on a Ctrl-C that its children have already got: not a second one
        if self.requested and number == signal.SIGINT and self.alone:
            raise KeyboardInterrupt
        self.requested = True
        dist.log("stopping after this step ...")

    def restore(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


# --- milestones -----------------------------------------------------------------------------------


@torch.no_grad()
def heldout_loss(config: Config, sampler: Pipeline, data, micro: int) -> float:
    """The averaged weights' loss on the held-out images, each with its fixed t and noise."""
    n, T, device = len(data.held_out), len(sampler.schedule), sampler.device
    shuffled = torch.randperm(n, generator=generator(config.seed, "held out t"))
    t = (shuffled.double() + 0.5).mul(T / n).long()  # stratified over 0 ... T-1
    total = torch.zeros((), device=device)
    pieces = [(low, min(low + micro, n)) for low in range(0, n, micro)]
    for low, high in pieces[dist.rank() :: dist.world_size()]:
        batch = data.held_out_batch(low, high)
        noise = [torch.randn(batch.pixels.shape[1:], generator=generator(config.seed, "held out", i))
                 for i in range(low, high)]  # fmt: skip
        shown = torch.zeros(high - low, dtype=torch.bool)
        cond = condition(config, batch, shown, sampler.model, device)
        total += training_loss(
            sampler.autocast(config.amp), sampler.schedule, config.objective,
            to_unit(batch.pixels, device), t[low:high], torch.stack(noise).to(device), cond,
            config.loss, config.min_snr_gamma,
        ).sum()  # fmt: skip
    return float(dist.all_reduce_sum(total)) / n


def sample_grid(config: Config, sampler: Pipeline):
    """The sheet of config.num_samples images on rank 0, which all ranks draw; None elsewhere."""
    n, ranks = config.num_samples, dist.world_size()
    indices = np.array_split(np.arange(n), ranks)[dist.rank()]
    images = np.empty((0, config.image_size, config.image_size, 3), np.uint8)
    labels = None
    if sampler.conditional:  # a block of the sheet for each class
        labels = torch.from_numpy(indices * len(sampler.classes) // n)
    if len(indices):
        x = sampler.sample(
            indices, seed=config.seed, sampler=config.sampler, amp=config.amp, labels=labels,
            steps=min(config.sample_steps, config.time_steps),
            guidance_scale=config.guidance_scale,
        )  # fmt: skip
        images = to_uint8(x)
    parts = dist.gather(torch.from_numpy(images))
    return grid(torch.cat(parts).numpy()) if parts is not None else None


def write_weights(folder: Path, config: Config, ema: EMA, data, step: int, best, improved) -> None:
    """ema.safetensors, best.safetensors if this is it, metadata.json."""
    weights, classes = ema.model.state_dict(), list(data.classes)
    for name in ("ema", *(["best"] if improved else [])):
        checkpoint.save_weights(folder / f"{name}.safetensors", weights, config, step=step, classes=classes)
    samples = step * config.batch_size
    epoch = samples / data.length if data.length else None
    checkpoint.write_text(folder / "metadata.json", checkpoint.json.dumps(
        {"step": step, "samples_seen": samples, "epoch": epoch, "best_loss": best}, indent=2))  # fmt: skip


# --- before the first step --------------------------------------------------------------------------


def start_from(model, path: Path) -> None:
    """Load weights of another run. Raises UserError if they are of another architecture."""
    weights, theirs, _ = checkpoint.load_weights(path)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit this network (it was trained with unet_dim "
                        f"{theirs.unet_dim}, dim_mults {theirs.dim_mults}, heads {theirs.heads}, "
                        f"condition {theirs.condition}): {error}") from None  # fmt: skip


def check_data(state: dict | None, data, config: Config) -> None:
    if state is not None and state["data"]["order"] != data.order_key():
        raise UserError(
            f"the files of --data {config.data} are not those that the run in "
            f"{config.save_folder} saw; to go on with the new ones, start from its weights: "
            f"--load_path {Path(config.save_folder) / 'model.pt'} --save_folder ANOTHER"
        )


def announce(config, model, data, device, dtype, share: Share, total: int) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    precision = str(dtype).removeprefix("torch.") if dtype else "float32"
    dist.log(f"{config.data}: {data.describe()}")
    dist.log(f"{parameters / 1e6:.1f} M parameters on {device}, {precision}; batch "
             f"{config.batch_size} = {share.ranks} ranks x {share.accum} x {share.micro}; "
             f"{total} steps")  # fmt: skip
