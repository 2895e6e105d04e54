"""Run train.py and sample.py as child processes: their arguments, what they cost, how they stop."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import UserError
from ..files.atomic import open_append, open_regular
from ..files.text_files import read_optional
from .plan import Cell, Settings

ROOT = Path(__file__).resolve().parent.parent.parent
STOP_SECONDS = 300  # for a stopped child to save its state
SHOWN_LINES = 12  # of a failed child's output


@dataclass(frozen=True)
class Base:
    """Properties of the base model that arguments depend on. objective: of Stable Diffusion."""

    image_size: int
    guidance_scale: float
    objective: str | None = None


def base_arguments(s: Settings, prefix: str = "", model: Path | None = None) -> list[str]:
    """Name the base model, or one that was trained from it, and where what it needs is.

    prefix: of --config and --weights, which train.py calls --sd_...
    """
    options = {
        "load_path": model or s.load_path,
        "sd_path": s.sd_path,
        "vae": s.vae,
        f"{prefix}config": s.sd_config,
    }
    if model is None:
        weights = None if s.sd_weights == "raw" else s.sd_weights
        options |= {f"{prefix}weights": weights, "objective": s.objective}
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def token_of(slug: str) -> str:
    return f"<{slug}>"


def train_arguments(
    s: Settings, base: Base, cell: Cell, slug: str, data: Path, folder: Path, cache: Path
) -> list[str]:
    """Write the arguments of train.py as --name=value, since values may begin with a dash.

    data: folder of the training images.
    """
    args = base_arguments(s, "sd_") + [
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
    foreign = s.load_path is None
    if foreign:
        args.append("--condition=text")
        if s.objective is None:
            args.append(f"--objective={base.objective}")
    if foreign or s.image_size is not None:
        args.append(f"--image_size={base.image_size}")
    prior = [] if s.class_prompt is None else [f"--class_prompt={s.class_prompt}"]
    kinds = {
        "lora": ["--adapter=lora", f"--rank={cell.rank}", f"--targets={s.targets}"],
        "textual_inversion": [
            "--adapter=textual_inversion",
            f"--token={token_of(slug)}",
            f"--vectors={s.vectors}",
            f"--init_word={s.init_word or cell.style}",
        ],
        "dreambooth": [f"--instance_prompt={cell.style}", *prior],
    }
    return args + kinds[cell.kind]


def sample_arguments(
    s: Settings, base: Base, cell: Cell, trained: list[Path], prompts: Path, folder: Path
) -> list[str]:
    """Write the arguments of sample.py. trained: what the trainings for the cell have written."""
    args = base_arguments(s, model=trained[0] if cell.kind == "dreambooth" else None)
    if cell.kind == "lora":
        args.append(f"--lora={trained[0]}")
    elif cell.kind == "textual_inversion":
        args.append(f"--embedding={trained[0]}")
    elif cell.kind == "mix":
        weights = zip(trained, (1 - cell.share, cell.share))
        args += [f"--lora={file}:{weight:g}" for file, weight in weights if weight]
    return args + [
        f"--prompt=@{prompts}",
        "--plain_prompts",
        f"--sampler={s.sampler}",
        f"--steps={s.sample_steps}",
        f"--guidance_scale={base.guidance_scale:g}",
        f"--seed={s.seed}",
        f"--device={s.device}",
        f"--amp={s.amp}",
        f"--height={base.image_size}",
        f"--width={base.image_size}",
        f"--save_folder={folder}",
    ]


def run_child(script: str, args: list[str], logs: Path, tick: Callable[[], None]) -> dict:
    """Run a script of the project to its end, and return what it cost.

    {"seconds", "cpu_seconds", "peak_memory", "peak_device_memory"}: seconds and bytes. Its output
    is appended to `logs`; tick() is called every second. Ctrl-C is passed on to it, and it may save
    its state; a second one ends it at once. Raises UserError if it fails.
    """
    child = Path(__file__).with_name("child.py")
    shown = shlex.join([Path(sys.executable).name, script, *args])
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as private, open_append(logs) as out:
        result = Path(private, "cost.json")
        out.write(f"\n$ {shown}\n".encode(errors="surrogateescape"))
        out.flush()
        start = out.tell()
        process = subprocess.Popen(
            [sys.executable, child, result, ROOT / script, *args],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
                tick()
        except BaseException:
            stop(process)
            raise
        cost = read_optional(result)
    if process.returncode:
        with open_regular(logs) as file:
            file.seek(start)
            said = file.read().decode(errors="replace")
        last = "\n".join(f"  {line}" for line in said.strip().splitlines()[-SHOWN_LINES:])
        raise UserError(
            f"{script} ended with status {process.returncode}:\n{last}\n  in: {shown}\n"
            "When this is mended, run the same command to resume the study."
        )
    return {"seconds": time.perf_counter() - began, **cost}


def stop(process: subprocess.Popen) -> None:
    """Interrupt a child and let it save its state; kill it if it does not end."""
    try:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_SECONDS)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        pass
    finally:
        process.kill()
        process.wait()
