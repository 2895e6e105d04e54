"""The training loop. One for every mode: modes differ in the batches that come in, in what is
trained and in what decodes the result, not here.

`step` is an optimizer step, `batch_size` counts the samples of a step over all ranks and
micro-batches. What sample j of step s sees (t, noise, flip, hidden condition) depends on
(seed, s, j) only.
"""

import contextlib
import math
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from .. import UserError
from ..config import Config
from ..evaluation.features import name_of
from ..files import checkpoint
from ..pictures.grid import NonFinite
from ..runtime import distributed as dist
from ..runtime.seeding import seed_of
from ..sampling.pipeline import amp_dtype
from . import faults
from .autoencoder import Autoencoding
from .ema import EMA
from .fid import Fid
from .finetune import ADAPTED
from .finetune_config import based_on
from .latent_task import LatentDiffusion
from .optimizer import AdamW
from .recipe import Diffusion
from .run_folder import RunLog, claim, clear, import_wandb, logged, resume, write_metadata
from .steps import Share, Tally, clip_factor, learning_rate, rank_share, total_steps

TASKS = {"pixel": Diffusion, "latent": LatentDiffusion, "vae": Autoencoding}
TAMER = "Try a lower --learning_rate, --amp no, or --grad_clip 1"
MOST_BAD_STEPS = 10  # non-finite steps in a row that end a run


def train(config: Config, given: set[str] | None = None) -> None:
    """Train, or go on training, as the configuration says. Raises UserError for mistakes in it.

    given: the fields that were asked for, see `based_on`; None: those that are not the defaults.
    """
    config = based_on(config, given)
    device = dist.setup(config.device, config.rank_timeout)
    share = rank_share(config)
    if config.overwrite and dist.restarted():
        dist.log("started again: the run that was begun goes on, --overwrite has been done")
        config = replace(config, overwrite=False)
    with faults.told(config, share.micro, lambda: 0):
        run(config, device, share)


def run(config: Config, device: torch.device, share: Share) -> None:
    """`train`, on this rank."""
    dtype = amp_dtype(config.amp, device)
    folder = Path(config.save_folder)
    lock = claim(folder)  # noqa: F841 - held until the end of the run

    # the parts
    config, state = resume(config, folder)
    if config.wandb:
        import_wandb()  # missing: say so now
    task = (ADAPTED if config.adapts else TASKS)[config.mode](config, device)
    data = task.data
    check_data(state, data, config)
    if not dist.agreed(-1 if state is None else state["step"]):
        raise UserError(
            f"not all ranks find the same run in {folder}: it must lie where all machines see it"
        )
    if state is not None:
        task.recognise(state)
    total = total_steps(config, data.length)
    if state is not None and state["step"] >= total and dist.is_main():
        checkpoint.point_model_to(folder, state["step"])
    if state is not None and state["step"] >= total and not fid_is_missing(config, state["step"]):
        dist.log(
            f"{folder} holds a finished run of {state['step']} steps; more --train_steps "
            "would continue it, --overwrite start anew"
        )
        return
    torch.manual_seed(seed_of(config.seed, "init"))
    model = task.build().to(device)
    task.start(model, fresh=state is None)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(
        learning, config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    # from 2^12 even ten overflows in a row leave a usable scale
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=dtype == torch.float16)
    ema = EMA(model, config.ema_decay)
    tally = Tally(device)
    step = 0

    # resume
    if state is not None:
        step = state["step"]
        task.restore(model, state["model"], state)
        task.restore(ema.model, state["ema"], state)
        optimizer.load_state_dict(state["optimizer"])
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        tally.sums.copy_(state["tally"])
        data.length = state["data"]["length"]
        ranks = state.get("ranks", share.ranks)
        other = f"; {ranks} ranks saved it, {share.ranks} go on" if ranks != share.ranks else ""
        dist.log(f"continuing the run in {folder} from step {step}{other}")
    best = state["best_loss"] if state is not None else None
    del state
    if config.compile:
        model.compile()
    parallel = dist.wrap(model)
    task.check(ema.model)
    fid = Fid(config, data, device) if config.fid else None

    # nothing is wrong: from here on files are written
    if config.overwrite:
        clear(folder)
    logs = RunLog(folder, config, step)
    announce(config, model, data, device, dtype, share, total)

    def save(improved: bool) -> None:
        """The checkpoint comes last: a run killed before it does this step again, whole."""
        if not dist.is_main():
            return
        if not torch.nn.utils.get_total_norm(learning).isfinite():
            raise UserError(
                f"the weights of step {step} are not finite and are not saved; the "
                f"checkpoints in {folder} are from before. {TAMER}"
            )
        told = task.told(ema.model)
        task.write(folder, ema.model, step, told, improved)
        write_metadata(folder, config, data, step, best)
        logs.sync()
        checkpoint.save(
            folder,
            {
                "step": step,
                "samples_seen": step * config.batch_size,
                "best_loss": best,
                "ranks": share.ranks,
                "config": asdict(config),
                **told,
                "data": {"order": data.order_key(), "length": data.length},
                "model": task.state(model),
                "ema": task.state(ema.model),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "tally": tally.sums.cpu(),
            },
            config.keep_last,
        )

    def measure_fid() -> None:
        """Where it is due, and not done before the run was stopped and continued."""
        if fid is None or not fid.due(step, total) or dist.any_rank(logs.has(step, fid.name)):
            return
        values = fid.measure(task.pipeline(ema.model), share.micro, lambda: stop.requested)
        if values is not None:
            logs.metrics(step, values)
            dist.log(
                f"step {step}: {fid.name} {values[fid.name]:.4g} ({values['fid_seconds']:.0f} s)"
            )
        clock.skip(step)

    with faults.told(config, share.micro, lambda: step), contextlib.ExitStack() as closing:
        stop = StopSignal()
        closing.callback(stop.restore)  # however the run ends
        closing.callback(logs.close)
        bar = closing.enter_context(dist.progress(total=total, initial=step, unit="step"))
        clock = Clock(step)
        measure_fid()
        while step < total:
            # the random numbers of this step's whole batch, of which this rank takes its share
            drawn = task.draw(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, total)
            if config.dropout or config.lora_dropout:
                torch.manual_seed(seed_of(config.seed, "dropout", step, dist.rank()))

            # forward, backward
            pieces = share.pieces(dist.rank())
            for i, (low, high) in enumerate(pieces):
                more = i + 1 < len(pieces)
                then = (step, *pieces[i + 1]) if more else (step + 1, *pieces[0])
                dist.at(f"step {step}, reading the batch")
                batch = data(step, low, high, then if more or step + 1 < total else None)
                dist.at(f"step {step}, forward and backward")
                with dist.no_sync(parallel, more):
                    with torch.autocast(device.type, dtype, enabled=dtype is not None):
                        losses = task.loss(parallel, batch, drawn, low, high)
                        loss = losses.mean() / len(pieces)
                    scaler.scale(loss).backward()
                tally.add_loss(loss)

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
            tally.add_step(norm, ok)
            step += 1
            bar.update()

            # log, save, sample
            milestone = step % config.save_and_sample_every == 0 or step == total
            if milestone or step % config.log_every == 0:
                values = tally.read() | {"lr": learning_rate(config, step - 1, total)}
                if values.pop("worst_streak") >= MOST_BAD_STEPS:
                    raise UserError(
                        f"{MOST_BAD_STEPS} steps in a row before step {step} had non-finite "
                        f"gradients; the checkpoints in {folder} are from before. {TAMER}"
                    )
                values["img_per_s"] = clock.rate(step) * config.batch_size
                if milestone and len(data.held_out):
                    values["heldout_loss"] = task.heldout_loss(ema.model, share.micro)
                logs.metrics(step, values)
                told = f"loss {values['loss']:.4f}, {values['img_per_s']:.0f} img/s"
                bar.set_postfix_str(told, refresh=False)
            if milestone:
                dist.at(f"step {step}, sampling and saving")
                loss = values.get("heldout_loss")
                improved = (
                    loss is not None and math.isfinite(loss) and (best is None or loss < best)
                )
                best = loss if improved else best
                if config.num_samples:
                    try:
                        sheet = task.sheet(ema.model, share.micro)
                    except NonFinite as error:  # training has its own count of bad steps
                        sheet = None
                        dist.log(f"warning: no sample grid at step {step}: {error}")
                    if sheet is not None:
                        logs.picture(step, sheet)
                save(improved)
                clock.skip(step)

            measure_fid()

            # stop
            if dist.asks(step) and dist.any_rank(stop.requested) and step < total:
                save(improved=False)
                dist.log(f"stopped at step {step}; the same command goes on from there")
                break

    if step >= total:
        dist.log(f"done: {task.result(folder)}")


# --- while it runs -------------------------------------------------------------------------------


class Clock:
    """Steps a second of training proper: saving and sampling do not count."""

    def __init__(self, step: int):
        self.skip(step)

    def skip(self, step: int) -> None:
        self.step = step
        self.time = time.perf_counter()

    def rate(self, step: int) -> float:
        steps = step - self.step
        seconds = time.perf_counter() - self.time
        self.skip(step)
        return steps / seconds


class StopSignal:
    """SIGINT and SIGTERM ask for a stop after the step; a second SIGINT stops at once."""

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
    """Of a finished run that was stopped while it measured."""
    path = Path(config.save_folder) / "metrics.jsonl"
    return config.fid and not logged(path, step, name_of(config.fid_features))


def check_data(state: dict | None, data, config: Config) -> None:
    if state is not None and state["data"]["order"] != data.order_key():
        raise UserError(
            f"the files of --data {config.data} are not those that the run in "
            f"{config.save_folder} saw (or an earlier version chose others of them: see "
            "CHANGELOG.md); to train on these, start from its weights: "
            f"--load_path {Path(config.save_folder) / 'model.pt'} --save_folder ANOTHER"
        )


def announce(config, model, data, device, dtype, share: Share, total: int) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    precision = str(dtype).removeprefix("torch.") if dtype else "float32"
    dist.log(f"{config.data}: {data.describe()}")
    part = "" if trained == parameters else f" ({trained:,} trained)"
    dist.log(
        f"{parameters / 1e6:.1f} M parameters{part} on {device}, {precision}; batch "
        f"{config.batch_size} = {share.ranks} ranks x {share.accum} x {share.micro}; "
        f"{total} steps"
    )
