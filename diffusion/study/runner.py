"""train.py and sample.py as child processes: their arguments, and how they are run and stopped."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import UserError
from .plan import Cell, Settings

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 300  # seconds that a stopped child has to save its state
TAIL = 12  # lines of a failed child that are shown


@dataclass(frozen=True)
class Base:
    """What of the base model decides on arguments. objective: of Stable Diffusion, else None."""

    image_size: int
    guidance_scale: float
    objective: str | None = None


def base_arguments(s: Settings, config: str) -> list[str]:
    """config: what the script calls the folder of configs."""
    if s.load_path is not None:
        return [f"--load_path={s.load_path}"]
    args = [f"--sd_path={s.sd_path}", *([f"--{config}={s.sd_config}"] if s.sd_config else [])]
    weights = "sd_weights" if config == "sd_config" else "weights"
    args += [f"--{weights}=ema"] if s.sd_weights == "ema" else []
    return args + ([f"--objective={s.objective}"] if s.objective is not None else [])


def token_of(slug: str) -> str:
    return f"<{slug}>"


def train_arguments(
    s: Settings, base: Base, cell: Cell, slug: str, data: Path, folder: Path, cache: Path
) -> list[str]:
    """Of train.py. data: the training images. Values stand after =: names may begin with a dash."""
    args = [
        *base_arguments(s, "sd_config"),
        "--mode=latent",
        "--preset=none",
        f"--data={data}",
        f"--save_folder={folder}",
        f"--cache_dir={cache}",
        f"--train_steps={cell.steps}",
        f"--batch_size={s.batch_size}",
        f"--learning_rate={cell.learning_rate:g}",
        "--loss=l2",
        "--lr_schedule=cosine",
        f"--lr_warmup_steps={min(20, cell.steps // 10)}",
        "--num_samples=0",
        f"--save_and_sample_every={max(50, cell.steps // 3)}",
        "--keep_last=1",
        f"--seed={s.seed}",
        f"--device={s.device}",
        f"--amp={s.amp}",
    ]
    if s.sd_path is not None:
        args += ["--condition=text"]
        args += [f"--objective={base.objective}"] if s.objective is None else []
    if s.sd_path is not None or s.image_size is not None:
        args += [f"--image_size={base.image_size}"]
    if cell.kind == "lora":
        args += ["--adapter=lora", f"--rank={cell.rank}", f"--targets={s.targets}"]
    elif cell.kind == "textual_inversion":
        args += [
            "--adapter=textual_inversion",
            f"--token={token_of(slug)}",
            f"--vectors={s.vectors}",
            f"--init_word={s.init_word or cell.style}",
        ]
    elif cell.kind == "dreambooth":
        args += [f"--instance_prompt={cell.style}"]
        args += [f"--class_prompt={s.class_prompt}"] if s.class_prompt is not None else []
    return args


def sample_arguments(
    s: Settings, base: Base, what: list[str], prompts: Path, count: int, folder: Path
) -> list[str]:
    """Of sample.py. what: the model, see `drawn_with`."""
    size = [f"--height={base.image_size}", f"--width={base.image_size}"]
    return [
        *what,
        f"--prompt=@{prompts}",
        f"--num_images={count}",
        f"--sampler={s.sampler}",
        f"--steps={s.sample_steps}",
        f"--guidance_scale={base.guidance_scale:g}",
        f"--seed={s.seed}",
        f"--device={s.device}",
        f"--amp={s.amp}",
        *size,
        f"--save_folder={folder}",
    ]


def drawn_with(s: Settings, cell: Cell, files: list[Path]) -> list[str]:
    """The options of sample.py that name a cell's model. files: what its training has left."""
    base = base_arguments(s, "config")
    if cell.kind == "lora":
        return [*base, f"--lora={files[0]}"]
    if cell.kind == "textual_inversion":
        return [*base, f"--embedding={files[0]}"]
    if cell.kind == "dreambooth":
        return [f"--load_path={files[0]}"]
    if cell.kind == "mix":
        weights = ((files[0], 1 - cell.share), (files[1], cell.share))
        return [*base, *(f"--lora={file}:{w:g}" for file, w in weights if w)]
    return base


def result_file(folder: Path, cell: Cell) -> Path:
    """What a cell's training leaves to share."""
    return folder / ("ema.safetensors" if cell.kind == "dreambooth" else "adapter.safetensors")


def run_child(script: str, args: list[str], logs: Path, tick: Callable[[], None]) -> dict:
    """Run a script of the project to its end; what it cost: {"seconds", "cpu_seconds",
    "peak_memory", "peak_device_memory"}, seconds and bytes.

    Its output is appended to `logs`; tick() is called every second. Ctrl-C is handed on to it, and
    its state is awaited; a second one ends it at once. Raises UserError if it fails.
    """
    result = logs.with_suffix(".child.json")
    result.unlink(missing_ok=True)
    child = str(Path(__file__).with_name("child.py"))
    command = [sys.executable, child, str(result), str(ROOT / script), *args]
    shown = shlex.join([Path(sys.executable).name, script, *args])
    began = time.perf_counter()
    with open(logs, "ab") as out:
        out.write(f"\n$ {shown}\n".encode())
        out.flush()
        start = out.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            wait(process, tick)
        except BaseException:
            stop(process)
            raise
    if process.returncode:
        with open(logs, "rb") as file:
            file.seek(start)
            text = file.read().decode(errors="replace").replace("\r", "\n")
        last = "\n".join(f"  {line}" for line in text.strip().splitlines()[-TAIL:])
        raise UserError(
            f"{script} ended with status {process.returncode}:\n{last}\n  in: {shown}\n"
            "the same command continues the study when that is mended"
        )
    found = json.loads(result.read_text())
    result.unlink()
    return {"seconds": time.perf_counter() - began, **found}


def wait(process: subprocess.Popen, tick: Callable[[], None]) -> None:
    while True:
        try:
            process.wait(timeout=1)
            return
        except subprocess.TimeoutExpired:
            tick()


def stop(process: subprocess.Popen) -> None:
    """Let it save; whatever else happens, it ends."""
    try:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        pass
    finally:
        process.kill()
        process.wait()
