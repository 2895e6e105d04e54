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
import re
import time
from pathlib import Path

from .. import UserError
from ..config import Config
from ..files import checkpoint, owned
from ..runtime.distributed import barrier, is_main, log
from ..runtime.seeding import seed_of

FOLDERS = ("checkpoints", "samples", "tensorboard")
FILES = (
    "config.json",
    "metadata.json",
    "metrics.jsonl",
    "model.pt",
    "ema.safetensors",
    "best.safetensors",
    "adapter.safetensors",
    "adapter_kohya.safetensors",
)
NAMES = "|".join(map(re.escape, FILES))
# what a run writes, relative to its folder; also half-written, by a process that was killed
WRITTEN = re.compile(
    r"checkpoints/(step_\d{8,}\.(pt|damaged)|\.step_\d{8,}\.pt\.tmp)"
    r"|samples/(step_\d{8,}\.png|\.step_\d{8,}\.png(\.\d+)?\.tmp)"
    r"|tensorboard/events\.out\.tfevents\..+"
    rf"|({NAMES})|\.({NAMES})\.tmp"
)


def claim(folder: Path):
    """Rank 0 locks the folder for as long as it lives. Raises UserError if another has it."""
    if not is_main():
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # what another program wrote there stays
    except OSError as error:
        raise UserError(f"--save_folder {folder} cannot be written: {error}") from None
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        raise UserError(
            f"another process is training in {folder}; wait, or choose another --save_folder"
        ) from None
    except OSError:
        pass  # a file system without locks
    return lock


def written(folder: Path) -> list[Path]:
    """List what lies where a run writes its files; config.json, the proof of a run, last."""
    levels = [folder, *(folder / name for name in FOLDERS)]
    found = [path for level in levels if level.is_dir() for path in level.iterdir()]
    ours = [p for p in found if WRITTEN.fullmatch(p.relative_to(folder).as_posix())]
    return sorted(ours, key=lambda path: (path.name == "config.json", path))


def check_folder(folder: Path, is_run: bool) -> None:
    """Raise UserError if the run would replace or delete what no run of this program wrote.

    is_run: whether there is proof that the folder is a run's.
    """
    for name in FOLDERS:
        path = folder / name
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist")
        if path.exists() and not path.is_dir():
            raise UserError(
                f"{path} is a file; a run keeps its {name} in a folder of this name: "
                "move it, or choose another --save_folder"
            )
    found = written(folder)
    if blocked := [path for path in found if path.is_dir()]:
        raise UserError(
            f"{blocked[0]} is a folder; a run writes a file of this name: move it, or "
            "choose another --save_folder"
        )
    found = [path for path in found if path.suffix != ".tmp"]  # of a run killed at its start
    if found and not is_run:
        names = [path.relative_to(folder).as_posix() for path in found]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(
            f"--save_folder {folder} holds {', '.join(names[:3])}{more}, which a run "
            "would replace, but no config.json of a run of this program: choose "
            "another --save_folder"
        )


def clear(folder: Path) -> None:
    """Delete the files of the run found there, and nothing else; links to folders stay."""
    if is_main():
        for path in written(folder):
            path.unlink()
        for name in FOLDERS:
            with contextlib.suppress(OSError):  # somebody else's files are in it
                if not (folder / name).is_symlink():
                    (folder / name).rmdir()
    barrier()


def find_run(folder: Path) -> dict | None:
    """Read the newest checkpoint of the run found there; None if it has none.

    Raises UserError if a run has checkpoints and none can be read, and for folders in which a run
    would replace somebody else's files.
    """
    is_run = owned.is_run(folder)
    state = None
    try:
        state = checkpoint.newest(folder, log)
    except checkpoint.Unreadable:
        raise
    except UserError:
        if is_run:
            raise
    check_folder(folder, is_run or state is not None)
    return state


def resume(config: Config, folder: Path) -> tuple[Config, dict | None]:
    """The configuration to go on with, and the newest checkpoint of the folder's run, or None.

    Raises UserError if the folder holds a run of another configuration.
    """
    source = Path(config.load_path).resolve() if config.load_path is not None else None
    own = source == (folder / "model.pt").resolve()
    if config.overwrite:
        if source is not None and folder.resolve() in source.parents:
            raise UserError("--overwrite would delete the file of --load_path; copy it elsewhere")
        if owned.is_run(folder):
            check_folder(folder, is_run=True)
        else:
            find_run(folder)
        return config, None  # the old run goes when the new one is about to write
    state = find_run(folder)
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
            "\n".join(
                [
                    f"{folder} holds a run of another configuration:",
                    *lines,
                    "choose another --save_folder, or delete that run with --overwrite",
                ]
            )
        )
    return config, state


class RunLog:
    """metrics.jsonl, TensorBoard and sample grids; does nothing off rank 0.

    step: where the run goes on; what was logged beyond it is cut away, so no step stands twice.
    """

    def __init__(self, folder: Path, config: Config, step: int):
        self.folder = folder
        self.writer = None
        if not is_main():
            return
        if config.wandb:
            # one run there for one run here, however often it is continued
            name = f"{folder.resolve()} {config.to_json()}"
            import_wandb().init(
                project="diffusion",
                name=folder.name,
                dir=folder,
                sync_tensorboard=True,
                id=f"{seed_of(name):x}",
                resume="allow",
                config=dataclasses.asdict(config),
            )
        from torch.utils.tensorboard import SummaryWriter

        for left in written(folder):
            if left.suffix == ".tmp":  # of a process that was killed while it wrote
                left.unlink()
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

        from ..pictures.grid import save_png

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
    about = {
        "step": step,
        "samples_seen": samples,
        "epoch": epoch,
        "best_loss": best,
        "num_train_images": data.length,
        "num_held_out": len(data.held_out),
    }
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
