"""A run's folder: the lock, the files of a run in it, resuming, its logs.

config.json  metadata.json  metrics.jsonl  tensorboard/  samples/step_*.png
checkpoints/  model.pt  ema.safetensors  best.safetensors      (see files/checkpoint.py)
averages/     of --posthoc_ema                                 (see training/posthoc_ema.py)
of an adapter, instead of the last two: adapter.safetensors  adapter_kohya.safetensors
and for peft: adapter_config.json  adapter_model.safetensors
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import NoReturn

from .. import UserError, shown, some
from ..config import Config, model_path, shared_path
from ..data.sources import NAMED, configured, open_data
from ..evaluation.features import name_of
from ..files import checkpoint, owned
from ..files.atomic import (
    append_text,
    blame,
    create,
    locked,
    open_append,
    read_lines,
    write_text,
)
from ..files.text_files import read_bytes, read_json
from ..runtime.distributed import any_rank, barrier, from_main, is_main, is_restart, log
from ..runtime.seeding import seed_of
from .finetune_config import open_base

FOLDERS = ("checkpoints", "averages", "samples", "tensorboard")
OVERWRITTEN = ".overwritten"
NAMES = (
    r"(config|metadata|adapter_config)\.json|metrics\.jsonl|model\.pt|\.overwritten"
    r"|(ema|best|adapter|adapter_kohya|adapter_model)\.safetensors"
)
# paths of a run's files, relative to its folder; .tmp: half-written, by a process that was killed
RUN_FILE = re.compile(
    r"checkpoints/(step_\d{8,}\.(pt|damaged)|\.step_\d{8,}\.pt(\.[0-9a-f]+)?\.tmp)"
    r"|averages/(step_\d{8,}\.safetensors|\.step_\d{8,}\.safetensors(\.[0-9a-f]+)?\.tmp)"
    r"|samples/(step_\d{8,}\.png|\.step_\d{8,}\.png(\.[0-9a-f]+)?\.tmp)"
    r"|tensorboard/events\.out\.tfevents\..+"
    rf"|({NAMES})|\.({NAMES})(\.[0-9a-f]+)?\.tmp"
)


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold the folder's lock on rank 0.

    Raises UserError if it cannot be written, or if another process has it.
    """
    with contextlib.ExitStack() as held:
        if is_main():
            lock = folder / ".lock"
            with blame(f"--save_folder: {lock} cannot be written", kinds=OSError):
                folder.mkdir(parents=True, exist_ok=True)
                free = held.enter_context(locked(lock, wait=False))
            if free is False:
                raise UserError(
                    f"another process is training in {folder}; wait, or choose another "
                    "--save_folder"
                )
        yield


def is_overwritten(folder: Path) -> bool:
    """Check whether this command has deleted the old run before it was restarted, on all ranks.

    `RunLog` leaves the name of what has launched the command in a file. The first start forgets
    it: a name may come twice.
    """
    file = folder / OVERWRITTEN
    done = False
    if is_main() and file.is_file():
        done = file.read_text(errors="replace") == launcher()
    restarted = is_restart()
    if is_main() and not restarted and owned.is_run(folder):
        file.unlink(missing_ok=True)
    return from_main(restarted and done)


def launcher() -> str:
    """Name the Slurm job or the torchrun that has launched this command; it restarts the same.

    By a number: torchrun's name is a folder of this machine.
    """
    errors = os.environ.get("TORCHELASTIC_ERROR_FILE", "")  # ID_RANDOM/attempt_0/0/error.json
    name = os.environ.get("SLURM_JOB_ID") or "/".join(errors.split("/")[:-3])
    return f"{seed_of(name):x}" if name else ""


def run_files(folder: Path) -> list[Path]:
    """List the files with the names of a run's; config.json, the proof of a run, comes last."""
    levels = [folder, *(folder / name for name in FOLDERS)]
    found = [path for level in levels if level.is_dir() for path in level.iterdir()]
    ours = [path for path in found if RUN_FILE.fullmatch(path.relative_to(folder).as_posix())]
    return sorted(ours, key=lambda path: (path.name == "config.json", path))


def refuse(path: Path, why: str) -> NoReturn:
    """Raise UserError for what a run would replace or cannot write to."""
    raise UserError(f"{path} {why}: move it, or choose another --save_folder")


def check_folder(folder: Path, is_run: bool) -> None:
    """Raise UserError if the run would replace or delete what no run of this program wrote.

    is_run: whether there is proof that the folder is a run's.
    """
    for name in FOLDERS:
        path = folder / name
        other = path.resolve().parent
        if path.exists() and not path.is_dir():
            refuse(path, f"is a file; a run keeps its {name} in a folder of this name")
        if path.is_symlink() and not path.exists():
            refuse(path, f"is a link to {os.readlink(path)}, which does not exist")
        if path.is_symlink() and owned.is_run(other) and not other.samefile(folder):
            refuse(path, f"is a link into {other}, another run's folder, which would be written to")
    found = run_files(folder)
    if blocked := [path for path in found if path.is_dir()]:
        refuse(blocked[0], "is a folder; a run writes a file of this name")
    found = [path for path in found if path.suffix != ".tmp"]  # of a run killed at its start
    if found and not is_run:
        names = some(path.relative_to(folder).as_posix() for path in found)
        refuse(folder, f"holds {names}, which a run would replace, but no config.json of a run")


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
    # a run writes them after its first checkpoint
    if state is None and (shared := [f for f in run_files(folder) if f.suffix == ".safetensors"]):
        refuse(shared[0], "would be replaced, and there is no checkpoint of a run that wrote it")
    return state


def resume(config: Config, folder: Path) -> tuple[Config, dict | None]:
    """Return the configuration to continue with, and the newest checkpoint of the folder's run.

    The checkpoint is None where there is no run, and with --overwrite.
    Raises UserError if the folder holds a run with another configuration.
    """
    source = Path(config.load_path).resolve() if config.load_path is not None else None
    from_itself = source == (folder / "model.pt").resolve()
    if config.overwrite:
        if owned.is_run(folder):
            check_folder(folder, is_run=True)
        else:
            find_run(folder)
        check_overwrite(config, folder)
        return config, None  # the old run is deleted when the new one is about to write
    state = find_run(folder)
    if state is None:
        if from_itself:
            raise UserError(f"--load_path {config.load_path}: {folder} holds no checkpoint")
        return config, None
    saved = Config.from_dict(state["config"])
    if from_itself:
        config = dataclasses.replace(config, load_path=saved.load_path)
    check_data(config, saved, state["data"].get("order"))
    changed = config.differences(saved)
    if not same_start(config, saved, state):
        changed["load_path"] = (config.load_path, saved.load_path)
    if not same_place(config.class_data, saved.class_data):
        changed["class_data"] = (config.class_data, saved.class_data)
    if changed:
        rows = [
            f"  {name}: {shown(old)} (saved) != {shown(new)} (given)\n"
            for name, (new, old) in changed.items()
        ]
        free = [f.name for f in dataclasses.fields(Config) if f.metadata["free"]]
        raise UserError(
            f"{folder} holds a run with a different configuration:\n{''.join(rows)}"
            f"give the saved values to continue it; {elsewhere(config)}\n"
            f"a run may be continued with other {', '.join(free)}"
        )
    return config, state


def check_overwrite(config: Config, folder: Path) -> None:
    """Raise UserError if --overwrite would delete what is not the run's, or what it needs."""
    links = [folder / name for name in FOLDERS if (folder / name).is_symlink()]
    if links and run_files(folder) and made_here(folder) is None:
        refuse(links[0], "is a link, which --overwrite follows in a run that was made here only")
    deleted = [path.resolve() for path in run_files(folder)]
    for name in ("load_path", "guide", *checkpoint.NETWORKS):
        path = getattr(config, name)
        if path is not None and Path(model_path(path)).resolve() in deleted:
            raise UserError(f"--overwrite would delete the file of --{name}; copy it elsewhere")


def check_data(config: Config, saved: Config, order: str | None) -> None:
    """Raise UserError if --data, named otherwise than a run's, is mistyped or has other images."""
    if saved.data in (config.data, shared_path(config.data)):
        return  # looked at later, with the rest
    here = os.path.exists(config.data) or (Path("data") / config.data).exists()
    download = config.data.startswith("hf:") or (config.data in NAMED and not here)
    if download or open_data(*configured(config)).order_key() != order:
        raise UserError(other_data(config))
    log(f"--data {config.data} has images of the same names as --data {saved.data} had")


def other_data(config: Config) -> str:
    """Say that a run saw other images than there are now."""
    return (
        f"the files of --data {config.data} are not those that the run in {config.save_folder} saw "
        f"(or an earlier version chose others of them: see CHANGELOG.md); {elsewhere(config)}"
    )


def elsewhere(config: Config) -> str:
    """Say how to train with other options than a run's, which stays as it is."""
    file = quote(str(Path(config.save_folder) / "model.pt"))
    start = f", from its weights with --load_path {file}" if config.adapter == "none" else ""
    return (
        f"to train with these, give --save_folder ANOTHER{start} (--overwrite would delete the run)"
    )


def same_place(given: str | None, before: str | None) -> bool:
    """Tell whether two paths, one as given and one as saved, lead to the same place."""
    if shared_path(given) == before or None in (given, before):
        return shared_path(given) == before
    return Path(given).resolve() == Path(before).resolve()


def same_start(config: Config, saved: Config, state: dict) -> bool:
    """Tell whether --load_path has the weights that a run began with, or lies where they lay.

    An adapter's base is compared in any case, when the adapter is put into it.
    """
    given, before = config.load_path, saved.load_path
    if given == before or None in (given, before):
        return given == before
    if config.adapter != "none":
        return True
    if state.get("origin") is not None and Path(given).exists():
        return open_base(config).digest() == state["origin"]
    return same_place(given, before)


class RunLog:
    """metrics.jsonl, TensorBoard and sample grids; does nothing off rank 0.

    step: where the run resumes; what was logged beyond it is deleted, so that no step is there
    twice.
    """

    def __init__(self, folder: Path, config: Config, step: int):
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.wandb = None
        if not is_main():
            return
        if config.wandb:
            # one run there for one run here, however often it is resumed
            name = f"{folder.resolve()} {config.to_json()}"
            self.wandb = import_wandb()
            self.wandb.init(
                project="diffusion",
                name=folder.name,
                dir=folder,
                id=f"{seed_of(name):x}",
                resume="allow",
                config=config.shared(),
            )
        for file in run_files(folder):
            if file.suffix == ".tmp":  # of a process that was killed while it wrote
                file.unlink()
        lock = folder / ".lock"
        if not lock.exists() or not lock.stat().st_size:
            append_text(lock, str(folder.stat().st_ino))  # see made_here
        # where things are on this machine stands here alone, see `checkpoint.locate`
        private = {
            name: os.path.abspath(path)
            for name in checkpoint.NETWORKS
            if (path := getattr(config, name)) and not path.startswith("hf:")
        }
        private = dataclasses.asdict(config) | private
        write_text(folder / "config.json", json.dumps(private, indent=2))
        if config.overwrite:
            write_text(folder / OVERWRITTEN, launcher())
        lines = [line for line in read_lines(self.path) if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        events = folder / "tensorboard"
        events.mkdir(exist_ok=True)
        # TensorBoard reads files by the times in their names, and a clock may have been set back
        times = [file.name.split(".")[3] for file in events.glob("events.out.tfevents.*")]
        now = max([int(time.time()), *(int(t) + 1 for t in times if t.isdecimal())])
        self.events = events / f"events.out.tfevents.{now:010d}.{secrets.token_hex(8)}"
        with create(self.events):
            pass
        self.event(step=step + 1, file_version="brain.Event:2")
        # steps from here on that are in older files are not shown
        self.event(step=step + 1, session_log={"status": "START"})
        text = "    " + config.to_json().replace("\n", "\n    ")  # as Markdown's code
        tensor = {"dtype": "DT_STRING", "string_val": [text.encode()], "tensor_shape": {"dim": []}}
        kind = {"plugin_data": {"plugin_name": "text"}}
        value = {"tag": "config", "metadata": kind, "tensor": tensor}
        self.event(step=step + 1, summary={"value": [value]})

    def event(self, **fields) -> None:
        """Append a record to this start's TensorBoard file."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        with open_append(self.events) as file:
            record = Event(wall_time=time.time(), **fields)
            RecordWriter(file).write(record.SerializeToString())

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write a line of metrics.jsonl, and a TensorBoard scalar for each value."""
        if not is_main():
            return
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        append_text(self.path, json.dumps({"step": step, **finite}) + "\n")
        scalars = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self.event(step=step, summary={"value": scalars})
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def picture(self, step: int, grid) -> None:
        """Write a sample grid (PIL image)."""
        from ..pictures.grid import save_png

        file = self.folder / "samples" / f"step_{step:08d}.png"
        save_png(grid, file)
        size = {"width": grid.width, "height": grid.height, "colorspace": 3}
        image = size | {"encoded_image_string": file.read_bytes()}
        self.event(step=step, summary={"value": [{"tag": "samples", "image": image}]})
        if self.wandb is not None:
            self.wandb.log({"samples": self.wandb.Image(grid)}, step=step)

    def sync(self) -> None:
        """Flush metrics.jsonl to the disk, before the checkpoint that relies on it."""
        if is_main():
            with open_append(self.path) as file:
                os.fsync(file.fileno())


def write_metadata(folder: Path, values: dict) -> None:
    """Write metadata.json: how far the run is."""
    write_text(folder / "metadata.json", json.dumps(values, indent=2))


def logged(path: Path, step: int, name: str, value: float | None = None) -> bool:
    """Check whether metrics.jsonl has a value of this name for this step, or just this one."""
    lines = [line for line in read_lines(path) if line["step"] == step and name in line]
    return any(value in (None, line[name]) for line in lines)


def is_published(folder: Path, step: int) -> bool:
    """Check whether what `TrainState.publish` writes of a step, or of a later one, is complete."""
    try:
        return read_json(folder / "metadata.json")["step"] >= step
    except (UserError, KeyError, TypeError):
        return False


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
    step = None if saved is None else saved["step"]
    if any_rank(step != from_main(step)):
        raise UserError(
            f"not all ranks find the same run in {folder}: it must lie where all machines see it"
        )
    if saved is not None:
        if saved["data"]["order"] != recipe.batches.order_key():
            raise UserError(other_data(recipe.config))
        recipe.check_checkpoint(saved)
