"""The training loop. One for every mode: what differs is the recipe.

`step` is an optimizer step, `batch_size` counts the samples of a step over all ranks and
micro-batches. What sample j of step s sees (t, noise, flip, dropped condition) depends on
(seed, s, j) only.
"""

import contextlib
import math
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .. import UserError
from ..config import Config
from ..evaluation.features import name_of
from ..files import checkpoint
from ..pictures.grid import NonFinite
from ..runtime import distributed as dist
from ..runtime.precision import amp_dtype
from ..runtime.seeding import seed_of
from . import faults
from .autoencoder import AutoencoderRecipe
from .ema import EMA
from .fid import Fid
from .finetune_config import Base, open_base, resolve_config
from .optimizer import AdamW
from .recipe import Recipe, heldout_loss, open_recipe
from .run_folder import RunLog, claim, clear, import_wandb, logged, resume, write_metadata
from .steps import BatchSplit, StepStats, clip_factor, learning_rate, split_batch, total_steps

DIVERGED_HINT = "Try a lower --learning_rate, --amp no, or --grad_clip 1"
MAX_BAD_STEPS = 10  # non-finite steps in a row that end a run


def train(config: Config, given: set[str] | None = None) -> None:
    """Train, or resume training, as the configuration says. Raises UserError for mistakes in it.

    given: the fields that were asked for, see `resolve_config`; None: those that are no defaults.
    """
    base = open_base(config) if config.adapts else None  # others need it at their start only
    config = resolve_config(config, given, base)
    device = dist.setup(config.device, config.rank_timeout)
    split = split_batch(config)
    if config.overwrite and dist.restarted():
        dist.log("Restarted: resuming, --overwrite already applied.")
        config = replace(config, overwrite=False)
    with faults.told(config, split.micro, lambda: 0):
        run(config, device, split, base)


@dataclass(eq=False)
class TrainState:
    """All that changes while a run trains: what a checkpoint holds."""

    recipe: Recipe | AutoencoderRecipe
    split: BatchSplit
    model: nn.Module
    ema: EMA
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    stats: StepStats
    step: int = 0
    best_loss: float | None = None

    def restore(self, saved: dict) -> None:
        """Continue from a checkpoint."""
        trainable = self.recipe.trainable
        self.step = saved["step"]
        self.best_loss = saved["best_loss"]
        trainable.restore(self.model, saved["model"], saved)
        trainable.restore(self.ema.model, saved["ema"], saved)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.stats.values.copy_(saved["tally"])
        self.recipe.batches.length = saved["data"]["length"]

    def save(self, folder: Path, logs: RunLog, improved: bool) -> None:
        """Write the checkpoint, last: a run killed before it does this step again, complete.

        Raises UserError, and writes nothing, for weights that are not finite.
        """
        if not dist.is_main():
            return
        if not torch.nn.utils.get_total_norm(self.optimizer.parameters).isfinite():
            raise UserError(
                f"the weights of step {self.step} are not finite and are not saved; the "
                f"checkpoints in {folder} are from before. {DIVERGED_HINT}"
            )
        config = self.recipe.config
        trainable = self.recipe.trainable
        batches = self.recipe.batches
        metadata = self.recipe.metadata(self.ema.model)
        trainable.write(folder, self.ema.model, self.step, metadata, improved)
        write_metadata(folder, config, batches, self.step, self.best_loss)
        logs.sync()
        saved = {
            "step": self.step,
            "samples_seen": self.step * config.batch_size,
            "best_loss": self.best_loss,
            "ranks": self.split.ranks,
            "config": asdict(config),
            **metadata,
            "data": {"order": batches.order_key(), "length": batches.length},
            "model": trainable.state(self.model),
            "ema": trainable.state(self.ema.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "tally": self.stats.values.cpu(),
        }
        checkpoint.save(folder, saved, config.keep_last)


def run(config: Config, device: torch.device, split: BatchSplit, base: Base | None) -> None:
    """`train`, on this rank."""
    dtype = amp_dtype(config.amp, device)
    folder = Path(config.save_folder)
    lock = claim(folder)  # noqa: F841 - held until the end of the run

    # the parts
    config, saved = resume(config, folder)
    if config.wandb:
        import_wandb()  # missing: say so now
    if base is None and saved is None:
        base = open_base(config)
    if config.mode == "vae":
        recipe = AutoencoderRecipe(config, device)
    else:
        recipe = open_recipe(config, device, base)
    batches = recipe.batches
    check_resume(saved, recipe, folder)
    total = total_steps(config, batches.length)
    if saved is not None and saved["step"] >= total:
        if dist.is_main():
            checkpoint.point_model_to(folder, saved["step"])
        if not fid_is_missing(config, saved["step"]):
            dist.log(
                f"{folder} holds a finished run of {saved['step']} steps; give more --train_steps "
                "to continue it, or --overwrite to start from scratch"
            )
            return
    torch.manual_seed(seed_of(config.seed, "init"))
    model = recipe.build().to(device)
    recipe.start(model, base, fresh=saved is None)
    del base
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(
        trained, config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    # from 2^12 even ten overflows in a row leave a usable scale
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=dtype == torch.float16)
    ema = EMA(model, config.ema_decay)
    stats = StepStats(device)
    state = TrainState(recipe, split, model, ema, optimizer, scaler, stats)
    if saved is not None:
        state.restore(saved)
        ranks = saved.get("ranks", split.ranks)
        other = f"; {ranks} ranks saved it, {split.ranks} resume" if ranks != split.ranks else ""
        dist.log(f"resuming the run in {folder} from step {state.step}{other}")
        del saved
    if config.compile:
        model.compile()
    parallel = dist.wrap(model)
    recipe.check(ema.model)
    fid = Fid(config, batches, device) if config.fid else None

    # nothing is wrong: from here on files are written
    if config.overwrite:
        clear(folder)
    logs = RunLog(folder, config, state.step)
    announce(config, model, batches, device, dtype, split, total)

    with faults.told(config, split.micro, lambda: state.step), contextlib.ExitStack() as closing:
        stop = StopSignal()
        closing.callback(stop.restore)  # however the run ends
        closing.callback(logs.close)
        bar = closing.enter_context(dist.progress(total=total, initial=state.step, unit="step"))
        if fid is not None:  # due, but not done before the run was stopped
            measure_fid(fid, state, total, logs, stop)
        clock = Clock(state.step)
        while state.step < total:
            step = state.step
            # the random numbers of this step's global batch, of which this rank takes its part
            draw = recipe.draw(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, total)
            if config.dropout or config.lora_dropout:
                torch.manual_seed(seed_of(config.seed, "dropout", step, dist.rank()))

            # forward, backward
            parts = split.micro_batches(dist.rank())
            for i, (low, high) in enumerate(parts):
                more = i + 1 < len(parts)
                then = (step, *parts[i + 1]) if more else (step + 1, *parts[0])
                dist.at(f"step {step}, reading the batch")
                batch = batches(step, low, high, then if more or step + 1 < total else None)
                dist.at(f"step {step}, forward and backward")
                with dist.no_sync(parallel, more):
                    with torch.autocast(device.type, dtype, enabled=dtype is not None):
                        losses = recipe.loss(parallel, step, batch, draw, low, high)
                        loss = losses.mean() / len(parts)
                    scaler.scale(loss).backward()
                stats.add_loss(loss)

            # update; a non-finite gradient is the same on all ranks, and changes nothing
            gradients = optimizer.take_gradients()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.get_total_norm(gradients)
            ok = torch.isfinite(norm)
            if config.grad_clip:
                torch._foreach_mul_(gradients, clip_factor(norm, config.grad_clip))
            optimizer.found_inf = (~ok).float()  # read by the fused kernel, on the device
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            ema.update(step, ok)
            stats.add_step(norm, ok)
            state.step = step = step + 1
            bar.update()

            # log, save, sample
            milestone = step % config.save_and_sample_every == 0 or step == total
            if milestone or step % config.log_every == 0:
                values = stats.read() | {"lr": learning_rate(config, step - 1, total)}
                if values.pop("worst_streak") >= MAX_BAD_STEPS:
                    raise UserError(
                        f"{MAX_BAD_STEPS} steps in a row before step {step} had non-finite "
                        f"gradients; the checkpoints in {folder} are from before. {DIVERGED_HINT}"
                    )
                values["img_per_s"] = clock.rate(step) * config.batch_size
                if milestone and len(batches.held_out):
                    loss = heldout_loss(recipe, ema.model, split.micro, device)
                    values["heldout_loss"] = loss
                logs.metrics(step, values)
                line = f"loss {values['loss']:.4f}, {values['img_per_s']:.0f} img/s"
                bar.set_postfix_str(line, refresh=False)
            if milestone:
                dist.at(f"step {step}, sampling and saving")
                loss = values.get("heldout_loss", math.nan)
                best = math.inf if state.best_loss is None else state.best_loss
                improved = math.isfinite(loss) and loss < best
                state.best_loss = loss if improved else state.best_loss
                if config.num_samples:
                    try:
                        picture = recipe.sample_grid(ema.model, split.micro)
                    except NonFinite as error:  # training has its own count of bad steps
                        picture = None
                        dist.log(f"warning: no sample grid at step {step}: {error}")
                    if picture is not None:
                        logs.picture(step, picture)
                state.save(folder, logs, improved)
                clock.skip(step)
            if fid is not None and measure_fid(fid, state, total, logs, stop):
                clock.skip(step)

            # stop
            if dist.asks(step) and dist.any_rank(stop.requested) and step < total:
                state.save(folder, logs, improved=False)
                dist.log(f"Stopped at step {step}. Run the same command to resume.")
                break

    if state.step >= total:
        dist.log(f"done: {recipe.trainable.result(folder)}")


# --- while it runs -------------------------------------------------------------------------------


def measure_fid(fid: Fid, state: TrainState, total: int, logs: RunLog, stop: "StopSignal") -> bool:
    """Measure and log the FID where it is due, unless that has been done; tell whether it was."""
    step = state.step
    if not fid.due(step, total) or dist.any_rank(logs.has(step, fid.name)):
        return False
    pipeline = state.recipe.pipeline(state.ema.model)
    values = fid.measure(pipeline, state.split.micro, lambda: stop.requested)
    if values is not None:
        logs.metrics(step, values)
        dist.log(f"step {step}: {fid.name} {values[fid.name]:.4g} ({values['fid_seconds']:.0f} s)")
    return True


class Clock:
    """Measure steps a second of training proper: saving and sampling do not count."""

    def __init__(self, step: int):
        self.skip(step)

    def skip(self, step: int) -> None:
        """Start measuring again."""
        self.step = step
        self.time = time.perf_counter()

    def rate(self, step: int) -> float:
        """Give the steps a second since the last call."""
        rate = (step - self.step) / (time.perf_counter() - self.time)
        self.skip(step)
        return rate


class StopSignal:
    """Stop after the step at SIGINT or SIGTERM; at a second SIGINT at once."""

    def __init__(self):
        self.requested = False
        self.alone = dist.world_size() == 1
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


# --- before the first step -----------------------------------------------------------------------


def fid_is_missing(config: Config, step: int) -> bool:
    """Tell whether a finished run was stopped while it measured its FID."""
    path = Path(config.save_folder) / "metrics.jsonl"
    return config.fid and not logged(path, step, name_of(config.fid_features))


def check_resume(saved: dict | None, recipe: Recipe | AutoencoderRecipe, folder: Path) -> None:
    """Raise UserError if a run cannot be resumed with the data and networks that are there now."""
    if saved is not None and saved["data"]["order"] != recipe.batches.order_key():
        raise UserError(
            f"the files of --data {recipe.config.data} are not those that the run in "
            f"{folder} saw (or an earlier version chose others of them: see CHANGELOG.md); to "
            f"train on these, start from its weights: --load_path {folder / 'model.pt'} "
            "--save_folder ANOTHER"
        )
    if not dist.agreed(-1 if saved is None else saved["step"]):
        raise UserError(
            f"not all ranks find the same run in {folder}: it must lie where all machines see it"
        )
    if saved is not None:
        recipe.check_checkpoint(saved)


def announce(
    config: Config,
    model: nn.Module,
    batches,
    device: torch.device,
    dtype: torch.dtype | None,
    split: BatchSplit,
    total: int,
) -> None:
    """Print what is about to be trained."""
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    precision = str(dtype).removeprefix("torch.") if dtype else "float32"
    dist.log(f"{config.data}: {batches.describe()}")
    part = "" if trained == parameters else f" ({trained:,} trained)"
    dist.log(
        f"{parameters / 1e6:.1f} M parameters{part} on {device}, {precision}; batch "
        f"{config.batch_size} = {split.ranks} ranks x {split.accum} x {split.micro}; "
        f"{total} steps"
    )
