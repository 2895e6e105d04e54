"""Run train.py and sample.py as child processes: their arguments, what they cost, how they stop."""

import contextlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .. import UserError
from ..files.atomic import open_append
from ..files.text_files import read_optional
from .plan import Cell, Settings

ROOT = Path(__file__).resolve().parent.parent.parent
STOP_SECONDS = 300  # for a stopped child to save its state
SHOWN_LINES = 12  # of a failed child's output


def base_arguments(s: Settings, prefix: str = "", model: Path | None = None) -> list[str]:
    """Name the base model, or one that was trained from it, and where what it needs is.

    prefix: of --config and --weights, which train.py calls --sd_...
    """
    options = {"load_path": model or s.load_path, "sd_path": s.sd_path, "vae": s.vae}
    options["guide"] = None if prefix else s.guide
    options[f"{prefix}config"] = s.sd_config
    if model is None:
        if s.sd_weights == "ema":
            options[f"{prefix}weights"] = "ema"
        options["objective"] = s.objective
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def token_of(slug: str) -> str:
    return f"<{slug}>"


def train_arguments(
    s: Settings, cell: Cell, slug: str, data: Path, folder: Path, cache: Path
) -> list[str]:
    """Write the arguments of train.py as --name=value, since values may begin with a dash.

    data: folder of the training images.
    """
    args = base_arguments(s, "sd_") + [
        "--preset=none",
        f"--image_size={s.image_size}",
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
    s: Settings, cell: Cell, trained: list[Path], prompts: Path, folder: Path
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
    if s.guidance_interval:
        args += ["--guidance_interval", *map(str, s.guidance_interval)]
    return args + [
        f"--prompt=@{prompts}",
        "--plain_prompts",
        f"--sampler={s.sampler}",
        f"--steps={s.sample_steps}",
        f"--guidance_scale={s.guidance_scale:g}",
        f"--seed={s.seed}",
        f"--device={s.device}",
        f"--amp={s.amp}",
        f"--height={s.image_size}",
        f"--width={s.image_size}",
        f"--save_folder={folder}",
        "--overwrite",
    ]


def run_child(script: str, args: list[str], logs: Path) -> dict:
    """Run a script of the project to its end, and return what it cost.

    {"seconds", "cpu_seconds", "peak_memory", "peak_device_memory"}: seconds and bytes. Its output
    is appended to `logs`. Ctrl-C is passed on to it, and it may save its state; a second one ends
    it at once. Raises UserError if it fails.
    """
    child = Path(__file__).with_name("child.py")
    shown = shlex.join([Path(sys.executable).name, script, *args])
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as private, open_append(logs) as out:
        result = Path(private, "cost.json")
        out.write(f"\n$ {shown}\n".encode(errors="surrogateescape"))
        out.flush()
        process = subprocess.Popen(
            [sys.executable, "-u", child, result, ROOT / script, *args],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait()
        finally:  # it may save its state; a second Ctrl-C ends it at once
            with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
                process.send_signal(signal.SIGINT)
                process.wait(STOP_SECONDS)
            process.kill()
            process.wait()
        cost = read_optional(result)
    if process.returncode:
        said = logs.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2]
        last = "\n".join(f"  {line}" for line in said.splitlines()[1:][-SHOWN_LINES:])
        raise UserError(
            f"{script} ended with status {process.returncode}:\n{last}\n  in: {shown}\n"
            "When this is mended, run the same command to resume the study."
        )
    return {"seconds": time.perf_counter() - began, **cost}
