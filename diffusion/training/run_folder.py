"""A run's folder: the lock, the files of a run in it, resuming, its logs.

config.json  metadata.json  metrics.jsonl  tensorboard/  samples/step_*.png
checkpoints/  model.pt  ema.safetensors  best.safetensors      (see files/checkpoint.py)
of an adapter, instead of the last two: adapter.safetensors  adapter_kohya.safetensors
and for peft: adapter_config.json  adapter_model.safetensors
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import time
from pathlib import Path

from .. import UserError, shown
from ..config import Config
from ..evaluation.features import name_of
from ..files import checkpoint, owned
from ..files.atomic import O_NOFOLLOW, append_text, read_lines, write_text
from ..files.text_files import read_bytes, read_json
from ..runtime.distributed import all_equal, barrier, is_main, log
from ..runtime.seeding import seed_of

FOLDERS = ("checkpoints", "samples", "tensorboard")
NAMES = (
    r"(config|metadata|adapter_config)\.json|metrics\.jsonl|model\.pt"
    r"|(ema|best|adapter|adapter_kohya|adapter_model)\.safetensors"
)
# paths of a run's files, relative to its folder; .tmp: half-written, by a process that was killed
RUN_FILE = re.compile(
    r"checkpoints/(step_\d{8,}\.(pt|damaged)|\.step_\d{8,}\.pt(\.[0-9a-f]{16})?\.tmp)"
    r"|samples/(step_\d{8,}\.png|\.step_\d{8,}\.png(\.[0-9a-f]+)?\.tmp)"
    r"|tensorboard/events\.out\.tfevents\..+"
    rf"|({NAMES})|\.({NAMES})(\.[0-9a-f]{{16}})?\.tmp"
)


def claim(folder: Path):
    """Lock the folder on rank 0, until the returned file is closed.

    Raises UserError if it cannot be written, or if another process has it.
    """
    if not is_main():
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # what another program wrote there stays, and where a link leads to, too
        lock = open(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | O_NOFOLLOW, 0o666), "a")
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


def run_files(folder: Path) -> list[Path]:
    """List the files with the names of a run's; config.json, the proof of a run, comes last."""
    levels = [folder, *(folder / name for name in FOLDERS)]
    found = [path for level in levels if level.is_dir() for path in level.iterdir()]
    ours = [path for path in found if RUN_FILE.fullmatch(path.relative_to(folder).as_posix())]
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
    found = run_files(folder)
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
            "would replace, but no config.json of a run of this program: choose another "
            "--save_folder"
        )


def clear(folder: Path) -> None:
    """Delete the files of the run found there, and nothing else; links to folders stay."""
    if is_main():
        for path in run_files(folder):
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
    """Return the configuration to continue with, and the newest checkpoint of the folder's run.

    The checkpoint is None where there is no run, and with --overwrite.
    Raises UserError if the folder holds a run with another configuration.
    """
    source = Path(config.load_path).resolve() if config.load_path is not None else None
    from_itself = source == (folder / "model.pt").resolve()
    if config.overwrite:
        if source is not None and folder.resolve() in source.parents:
            raise UserError("--overwrite would delete the file of --load_path; copy it elsewhere")
        if owned.is_run(folder):
            check_folder(folder, is_run=True)
        else:
            find_run(folder)
        return config, None  # the old run is deleted when the new one is about to write
    state = find_run(folder)
    if state is None:
        if from_itself:
            raise UserError(f"--load_path {config.load_path}: {folder} holds no checkpoint")
        return config, None
    saved = Config.from_dict(state["config"])
    if from_itself:
        config = dataclasses.replace(config, load_path=saved.load_path)
    if changed := config.differences(saved):
        lines = [
            f"  {name}: {shown(old)} (saved) != {shown(new)} (given)"
            for name, (new, old) in changed.items()
        ]
        lines.insert(0, f"{folder} holds a run with a different configuration:")
        lines.append("choose another --save_folder, or delete that run with --overwrite")
        raise UserError("\n".join(lines))
    return config, state


class RunLog:
    """metrics.jsonl, TensorBoard and sample grids; does nothing off rank 0.

    step: where the run resumes; what was logged beyond it is deleted, so that no step is there
    twice.
    """

    def __init__(self, folder: Path, config: Config, step: int):
        self.folder = folder
        self.writer = None
        if not is_main():
            return
        if config.wandb:
            # one run there for one run here, however often it is resumed
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

        for file in run_files(folder):
            if file.suffix == ".tmp":  # of a process that was killed while it wrote
                file.unlink()
        lock = folder / ".lock"
        if not lock.exists() or not lock.stat().st_size:
            append_text(lock, str(folder.stat().st_ino))  # see made_here
        write_text(folder / "config.json", config.to_json())
        self.path = folder / "metrics.jsonl"
        lines = [line for line in read_lines(self.path) if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        _order_events(folder / "tensorboard")
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write a line of metrics.jsonl, and a TensorBoard scalar for each value."""
        if self.writer is None:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        append_text(self.path, json.dumps({"step": step, **finite}) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def has(self, step: int, name: str) -> bool:
        """Check whether a value of this step has been logged; False off rank 0."""
        return self.writer is not None and logged(self.path, step, name)

    def picture(self, step: int, grid) -> None:
        """Write a sample grid (PIL image)."""
        import numpy as np

        from ..pictures.grid import save_png

        save_png(grid, self.folder / "samples" / f"step_{step:08d}.png")
        self.writer.add_image("samples", np.asarray(grid), step, dataformats="HWC")

    def close(self) -> None:
        if self.writer is not None:
            with contextlib.suppress(OSError):  # that it could not be written has been said
                self.writer.close()

    def sync(self) -> None:
        """Flush metrics.jsonl to the disk, before the checkpoint that relies on it."""
        if self.writer is not None:
            with open(self.path, "rb+") as file:
                os.fsync(file.fileno())


def write_metadata(folder: Path, config: Config, data, step: int, best) -> None:
    """Write metadata.json: how far the run is."""
    samples = step * config.batch_size
    values = {
        "step": step,
        "samples_seen": samples,
        "epoch": samples / data.length if data.length else None,
        "best_loss": best,
        "num_train_images": data.length,
        "num_held_out": len(data.held_out),
    }
    write_text(folder / "metadata.json", json.dumps(values, indent=2))


def _order_events(folder: Path) -> None:
    """Rename event files that would come after a new one.

    TensorBoard reads them by the time in their names: after a clock was set back the old ones
    would come last, and steps that were deleted from them would come back.
    """
    found = sorted(folder.glob("events.out.tfevents.*"))
    times = [file.name.split(".")[3] for file in found]
    if any(not t.isdigit() or int(t) >= int(time.time()) for t in times):
        for i, (file, old) in enumerate(zip(found, times)):
            file.rename(file.with_name(file.name.replace(old, f"{i:010d}", 1)))


def logged(path: Path, step: int, name: str) -> bool:
    """Check whether metrics.jsonl has a value of this name for this step."""
    return any(line["step"] == step and name in line for line in read_lines(path))


def made_here(folder: Path) -> Config | None:
    """Read the configuration of a run that was made in this very folder, None of any other.

    Its .lock holds the number that the file system gave the folder. One that was copied or came
    out of an archive has another, and its configuration the paths of somebody else.
    """
    try:
        own = read_bytes(folder / ".lock", 40, cut=True).decode() == str(folder.stat().st_ino)
        return Config.from_dict(read_json(folder / "config.json")) if own else None
    except (OSError, ValueError):
        return None


def import_wandb():
    """Import wandb. Raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the wandb library: pip install wandb") from None
    return wandb


# --- before a run is resumed ---


def fid_is_missing(config: Config, step: int) -> bool:
    """Tell whether a finished run was stopped while it measured its FID."""
    path = Path(config.save_folder) / "metrics.jsonl"
    return config.fid and not logged(path, step, name_of(config.fid_features))


def check_resume(saved: dict | None, recipe, folder: Path) -> None:
    """Raise UserError if a run cannot be resumed with the data and networks that are there now."""
    if saved is not None and saved["data"]["order"] != recipe.batches.order_key():
        raise UserError(
            f"the files of --data {recipe.config.data} are not those that the run in "
            f"{folder} saw (or an earlier version chose others of them: see CHANGELOG.md); to "
            f"train on these, start from its weights: --load_path {folder / 'model.pt'} "
            "--save_folder ANOTHER"
        )
    if not all_equal(-1 if saved is None else saved["step"]):
        raise UserError(
            f"not all ranks find the same run in {folder}: it must lie where all machines see it"
        )
    if saved is not None:
        recipe.check_checkpoint(saved)
