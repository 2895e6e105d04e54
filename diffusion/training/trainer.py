"""The training loop. One for every mode: what differs is the recipe.

`step` is an optimizer step, `batch_size` counts the samples of a step over all ranks and
micro-batches. What sample j of step s sees (t, noise, flip, dropped condition) depends on
(seed, s, j) only.
"""

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import torch

from .. import UserError
from ..config import Config
from ..evaluation.fid import Fid
from ..files import checkpoint
from ..files.atomic import blame
from ..files.hub_files import upload
from ..runtime import compiler, threads
from ..runtime import distributed as dist
from ..runtime.precision import amp_dtype
from ..runtime.seeding import seed_of
from ..sampling.image_tensor import NonFinite
from . import posthoc_ema, share
from .autoencoder import AutoencoderRecipe
from .ema import EMA, TRACKS
from .faults import friendly_errors
from .finetune_config import Base, open_base, resolve_config
from .optimizer import open_optimizer
from .progress import Clock, StopSignal, announce, measure_fid
from .recipe import heldout_loss, open_recipe
from .run_folder import (
    RunLog,
    check_resume,
    claim,
    clear,
    fid_is_missing,
    import_wandb,
    is_overwritten,
    is_published,
    logged,
    resume,
)
from .steps import BatchSplit, StepStats, learning_rate, split_batch, total_steps
from .train_state import DIVERGED_HINT, TrainState
from .train_step import TrainStep, not_captured

# what a checkpoint of other contents than ours raises
DAMAGES = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
MAX_BAD_STEPS = 10  # non-finite steps in a row that end a run


def train(config: Config, given: set[str] | None = None) -> None:
    """Train, or resume training, as the configuration says. Raises UserError for mistakes in it.

    given: the fields that were asked for, see `resolve_config`; None: those that are no defaults.
    """
    base = open_base(config) if config.adapts else None  # others need it at their start only
    config = resolve_config(config, given, base)
    device = dist.setup(config.device, config.rank_timeout)
    if config.push_to_hub and dist.is_main():
        upload(config.push_to_hub, {})  # refused: say so now
    if config.compile:
        compiler.prepare(device)
    split = split_batch(config)
    folder = Path(config.save_folder)
    with friendly_errors(config, split.micro, lambda: 0), claim(folder), threads.kept():
        if config.overwrite and is_overwritten(folder):
            dist.log("Restarted: resuming, --overwrite already applied.")
            config = replace(config, overwrite=False)
        run(config, device, split, base)


def run(config: Config, device: torch.device, split: BatchSplit, base: Base | None) -> None:
    """`train`, on this rank."""
    dtype = amp_dtype(config.amp, device)
    folder = Path(config.save_folder)

    # the parts
    config, saved = resume(config, folder)
    if saved is not None and device.type == "cpu" and saved["ranks"] == split.ranks:
        # before anything is computed
        if said := threads.use_threads_of(saved.get("threads")):
            dist.log(said)
    if config.wandb:
        import_wandb()  # missing: say so now
    if base is None and saved is None:
        base = open_base(config)
    if config.mode == "vae":
        recipe = AutoencoderRecipe(config, device)
    else:
        recipe = open_recipe(config, device, base)
    batches = recipe.batches
    with blame(
        f"{folder} cannot be resumed from its newest checkpoint", kinds=(LookupError, TypeError)
    ):
        check_resume(saved, recipe, folder)
    total = total_steps(config, batches.length)
    published = saved is None or is_published(folder, saved["step"])
    if saved is not None and dist.is_main():
        checkpoint.complete(folder, saved["step"], config.keep_last)
    if saved is not None and saved["step"] >= total:
        if not dist.any_rank(not published or fid_is_missing(config, saved["step"])):
            share.push(config, folder)
            dist.log(
                f"{folder} holds a finished run of {saved['step']} steps; give more --train_steps "
                "to continue it, or --overwrite to start from scratch"
            )
            return
    torch.manual_seed(seed_of(config.seed, "init"))
    model = recipe.build().to(device)
    recipe.start(model, base, fresh=saved is None)
    origin = saved.get("origin") if saved is not None else base and base.digest()
    del base
    optimizer = open_optimizer(config, model)
    # from 2^12 even ten overflows in a row leave a usable scale
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=dtype == torch.float16)
    ema = EMA(model, config.ema_decay)
    ema.tracks = [EMA(model, 1, length) for length in TRACKS if config.posthoc_ema]
    stats = StepStats(device)
    state = TrainState(recipe, split, model, ema, optimizer, scaler, stats, origin=origin)
    if saved is not None:
        with blame(f"{folder} cannot be resumed from its newest checkpoint", kinds=DAMAGES):
            state.restore(saved)
        ranks = saved["ranks"]
        other = f"; {ranks} ranks saved it, {split.ranks} resume" if ranks != split.ranks else ""
        dist.log(f"resuming the run in {folder} from step {state.step}{other}")
        del saved
    if config.compile:
        model.compile()
    eager = not_captured(config, device, dtype)
    parts = (recipe, dist.wrap(model), optimizer, scaler, ema, stats, dtype)
    train_step = TrainStep(*parts, graph=eager is None)
    recipe.check(ema.model)
    fid = Fid(config, batches, device) if config.fid else None

    # nothing is wrong: from here on files are written
    if config.overwrite:
        clear(folder)
    logs = RunLog(folder, config, state.step)
    if not published and dist.is_main():  # the run was killed after it wrote its checkpoint
        loss = state.best_loss
        best = loss is not None and logged(logs.path, state.step, "heldout_loss", loss)
        state.publish(folder, recipe.metadata(ema.model), best)
    announce(recipe, model, split, total, eager)

    with (
        friendly_errors(config, split.micro, lambda: state.step),
        contextlib.ExitStack() as closing,
    ):
        stop = StopSignal()
        closing.callback(stop.restore)  # however the run ends
        bar = closing.enter_context(dist.progress(total=total, initial=state.step, unit="step"))
        if fid is not None:  # due, but not done before the run was stopped
            measure_fid(fid, state, total, logs, stop)
        clock = Clock(state.step)
        while state.step < total:
            step = state.step
            # the random numbers of this step's global batch, of which this rank takes its part
            draw = recipe.draw(step)
            optimizer.set_learning_rate(learning_rate(config, step, total))
            ema.begin(step)
            if config.dropout or config.lora_dropout:
                torch.manual_seed(seed_of(config.seed, "dropout", step, dist.rank()))

            # forward, backward, update
            parts = split.micro_batches(dist.rank())
            inputs = []
            for i, (low, high) in enumerate(parts):
                more = i + 1 < len(parts)
                then = (step, *parts[i + 1]) if more else (step + 1, *parts[0])
                batch = batches(step, low, high, then if more or step + 1 < total else None)
                inputs.append(recipe.inputs_of(step, batch, draw, low, high))
            train_step(inputs)
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
                    loss = heldout_loss(recipe, ema.model, split.micro)
                    values["heldout_loss"] = loss
                logs.metrics(step, values)
                line = f"loss {values['loss']:.4f}, {values['img_per_s']:.0f} img/s"
                bar.set_postfix_str(line, refresh=False)
            if milestone:
                dist.barrier(f"step {step}")
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
                if ema.tracks and dist.is_main():
                    posthoc_ema.keep(folder, step, config, ema.tracks)
                state.save(folder, logs, improved)
                best = " (the best yet)" if improved else ""
                held = "" if math.isnan(loss) else f", held-out loss {loss:.4f}{best}"
                dist.log(f"step {step}: saved, {line}{held}")
                dist.barrier(f"sampling and saving at step {step}")
            measured = fid is not None and measure_fid(fid, state, total, logs, stop)
            if milestone and config.push_to_hub:
                share.push(config, folder)
                dist.barrier()  # the others wait for it as for any long work
            if milestone or measured:
                clock.skip(step)

            # stop
            if dist.should_poll_stop(step) and dist.any_rank(stop.requested) and step < total:
                state.save(folder, logs, improved=False)
                dist.log(f"Stopped at step {step}, which is saved. Run the same command to resume.")
                break

    if state.step >= total:
        dist.log(f"done: {recipe.trainable.result(folder)}")
