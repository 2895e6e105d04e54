"""A run's folder: who may use it, what it holds, its logs.

config.json  metadata.json  metrics.jsonl  tensorboard/  samples/step_*.png
checkpoints/  model.pt  ema.safetensors  best.safetensors      (see weights/checkpoint.py)
of an adapter, instead of the last two: adapter.safetensors  adapter_kohya.safetensors
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
from pathlib import Path

from .. import UserError
from ..config import Config
from ..distributed import barrier, is_main, log
from ..seeding import seed_of
from ..weights import checkpoint

FILES = ("config.json", "metadata.json", "metrics.jsonl", "model.pt", "ema.safetensors",
         "best.safetensors", "tensorboard", "checkpoints", "samples", "adapter.safetensors",
         "adapter_kohya.safetensors")  # fmt: skip


def claim(folder: Path):
    """Rank 0 locks the folder for as long as it lives. Raises UserError if another has it."""
    if not is_main():
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(f"--save_folder {folder} cannot be written: {error}") from None
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        raise UserError(f"another process is training in {folder}; wait, or choose another "
                        "--save_folder") from None  # fmt: skip
    except OSError:
        pass  # a file system without locks
    return lock


def clear(folder: Path) -> None:
    """Delete what a run writes, and nothing else."""
    if is_main():
        for name in FILES:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    barrier()


def resume(config: Config, folder: Path) -> tuple[Config, dict | None]:
    """The configuration to go on with, and the newest checkpoint of the folder's run, or None.

    Raises UserError if the folder holds a run of another configuration.
    """
    source = Path(config.load_path).resolve() if config.load_path is not None else None
    own = source == (folder / "model.pt").resolve()
    if config.overwrite:
        if source is not None and folder.resolve() in source.parents:
            raise UserError("--overwrite would delete the file of --load_path; copy it elsewhere")
        return config, None  # the old run goes when the new one is about to write
    state = checkpoint.newest(folder, log)
    if state is None:
        if own:
            raise UserError(f"--load_path {config.load_path}: {folder} holds no checkpoint")
        return config, None
    saved = Config.from_dict(state["config"])
    if own:
        config = dataclasses.replace(config, load_path=saved.load_path)
    if changed := config.differences(saved):
        lines = [f"  {name}: {old!r} there, {new!r} now" for name, (new, old) in changed.items()]
        raise UserError(
            "\n".join([f"{folder} holds a run of another configuration:", *lines,
                       "choose another --save_folder, or delete that run with --overwrite"])
        )  # fmt: skip
    return config, state


class RunLog:
    """metrics.jsonl, TensorBoard and sample grids; does nothing off rank 0.

    step: where the run goes on; what was logged beyond it is cut away, so no step stands twice.
    """

    def __init__(self, folder: Path, config: Config, step: int):
        self.folder, self.writer = folder, None
        if not is_main():
            return
        if config.wandb:
            # one run there for one run here, however often it is continued
            name = f"{folder.resolve()} {config.to_json()}"
            import_wandb().init(
                project="diffusion", name=folder.name, dir=folder, sync_tensorboard=True,
                id=f"{seed_of(name):x}", resume="allow", config=dataclasses.asdict(config),
            )  # fmt: skip
        from torch.utils.tensorboard import SummaryWriter

        for left in [*folder.glob(".*.tmp"), *(folder / "checkpoints").glob(".*.tmp")]:
            left.unlink(missing_ok=True)  # of a process that was killed while it wrote
        checkpoint.write_text(folder / "config.json", config.to_json())
        self.path = folder / "metrics.jsonl"
        kept = [line for line in checkpoint.read_lines(self.path) if line["step"] <= step]
        checkpoint.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        _order_events(folder / "tensorboard")
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and a TensorBoard scalar each."""
        if self.writer is None:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def has(self, step: int, name: str) -> bool:
        """Whether a value of this step has been logged; False off rank 0."""
        return self.writer is not None and logged(self.path, step, name)

    def picture(self, step: int, sheet) -> None:
        """A sample grid (PIL image)."""
        import numpy as np

        from ..evaluation.viz import save_png

        save_png(sheet, self.folder / "samples" / f"step_{step:08d}.png")
        self.writer.add_image("samples", np.asarray(sheet), step, dataformats="HWC")

    def close(self) -> None:
        if self.writer is not None:
            with contextlib.suppress(OSError):  # what could not be written has been told
                self.writer.close()

    def sync(self) -> None:
        """Bring the lines to the disk, before the checkpoint that promises them."""
        if self.writer is not None:
            with open(self.path, "rb+") as file:
                os.fsync(file.fileno())


def write_metadata(folder: Path, config: Config, data, step: int, best) -> None:
    """metadata.json: how far the run is."""
    samples = step * config.batch_size
    epoch = samples / data.length if data.length else None
    about = {"step": step, "samples_seen": samples, "epoch": epoch, "best_loss": best,
             "num_train_images": data.length, "num_held_out": len(data.held_out)}  # fmt: skip
    checkpoint.write_text(folder / "metadata.json", json.dumps(about, indent=2))


def _order_events(folder: Path) -> None:
    """TensorBoard reads event files by the time in their names: a clock set back would put the new
    file before the old ones, whose cut-away steps would then come back."""
    found = sorted(folder.glob("events.out.tfevents.*"))
    times = [file.name.split(".")[3] for file in found]
    if any(not t.isdigit() or int(t) >= int(time.time()) for t in times):
        for i, (file, old) in enumerate(zip(found, times)):
            file.rename(file.with_name(file.name.replace(old, f"{i:010d}", 1)))


def logged(path: Path, step: int, name: str) -> bool:
    """Whether metrics.jsonl has a value of this name for this step."""
    return any(line["step"] == step and name in line for line in checkpoint.read_lines(path))


def import_wandb():
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the wandb library: pip install wandb") from None
    return wandb
