"""Every write of every command fails, or is the last thing that its process does (fault_plan.py).

Then the same command runs undisturbed, and the folder is that of a run that nothing happened to:
the same files, weights, lines and pictures, bit for bit.
"""

import os
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import fault_plan
import pytest
import warm
from fault_plan import BROKEN, FULL, KILL, READ_ONLY
from helpers import LORA, flags, on_scratch, plain, run_lines, tiny_run

from diffusion.files import checkpoint, tensors

DREAMBOOTH = dict(instance_prompt="a photo of sks face", class_prompt="a face", class_images=11)


@dataclass
class Command:
    """A command that writes below the folder that it runs in."""

    args: list
    ranks: int = 0
    found: dict = field(default_factory=dict)  # what the folder holds when nothing happened

    def run(self, folder: Path, **plan):
        folder.mkdir(exist_ok=True)
        name, *args = self.args
        env = fault_plan.plan(folder, **plan) if plan else {}
        return warm.script(name, *args, cwd=folder, ranks=self.ranks, env=env)


def contents(folder: Path) -> dict:
    """All that is in a folder, but for times, locks and TensorBoard's files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or "tensorboard/" in name or path.name in (".lock", ".overwritten"):
            continue
        if name.startswith("cache/"):  # folders are named by the times of their images
            if not name.endswith((".tmp", ".lock")):
                found.setdefault(f"cache/{path.name}", []).append(path.read_bytes())
                found[f"cache/{path.name}"].sort()
        elif path.suffix == ".pt":  # the file's own name is in it
            found[name] = digest(checkpoint.read(path))
        elif path.suffix == ".safetensors":  # the order of its texts is not fixed
            content, about = tensors.read_safetensors(path)
            found[name] = digest([content, sorted(about.items())])
        elif path.name == "metrics.jsonl":
            found[name] = run_lines(path.parent)
        else:
            found[name] = path.read_bytes()
    return found


def digest(value):
    """Tensors in nested dictionaries and lists as bytes."""
    if isinstance(value, dict):
        return {k: digest(v) for k, v in value.items() if k != "overwrite"}
    if isinstance(value, (list, tuple)):
        return [digest(v) for v in value]
    return value.numpy().tobytes() if hasattr(value, "numpy") else value


def differences(found: dict, expected: dict) -> list[str]:
    return sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))


def disturb(command: Command, folder: Path, points, errors=(), rank: int = 0) -> int:
    """Killed at each of these points, and one of the errors there; how many were hit.

    Stops at the first point that the command does not reach.
    """
    if not command.found:
        whole = folder / "whole"
        done = command.run(whole)
        assert done.returncode == 0, done.stderr
        command.found = contents(whole)
    hits = 0
    began = time.time()
    for n in points:
        for error in [KILL, *errors[n % len(errors) :][:1]] if errors else [KILL]:
            place = folder / f"{n}_{error}_{rank}"
            done = command.run(place, n=n, error=error, rank=rank)
            hit = fault_plan.hit_file(place)
            if not hit.exists():
                assert done.returncode == 0, done.stderr
                return hits
            where = f"{n}: {hit.read_text()}, {error}"
            if error != KILL:  # a few are not needed, such as a lock's removal
                refused = done.stderr.rpartition("error: ")[2]
                assert "Traceback" not in done.stderr and "Exception" not in done.stderr, (
                    where,
                    done.stderr,
                )
                assert done.returncode == 0 or len(refused.splitlines()) == 1, (where, done.stderr)
                assert done.returncode in (0, 1), where
            again = command.run(place)
            assert again.returncode == 0, (where, again.stderr)
            assert "Traceback" not in again.stderr, (where, again.stderr)
            changed = differences(contents(place), command.found)
            assert not changed, (where, changed)
            hits += 1
            print(f"{time.time() - began:.0f} s: {where}", flush=True)
            shutil.rmtree(place)
    return hits


# every thirteenth event of writing; all, which take hours: FAULT_FROM=1 FAULT_STRIDE=1
ALL = range(int(os.environ.get("FAULT_FROM", 4)), 10_000, int(os.environ.get("FAULT_STRIDE", 13)))
ERRORS = (FULL, BROKEN, READ_ONLY)


def some(count: int, most: int) -> list[int]:
    """A few points, others in each run of the tests."""
    seed = time.time_ns() % 10**6
    print("seed", seed)
    return sorted(random.Random(seed).sample(range(1, most), count))


@pytest.fixture
def folder(quick_path):
    return quick_path


@pytest.fixture
def pixel(faces, tmp_path) -> Command:
    options = tiny_run(faces, Path()) | dict(cache_dir=str(tmp_path / "cache"))
    options |= dict(train_steps=4, save_and_sample_every=2, log_every=1, dim_mults=(1,),
                                             heads=1, num_samples=2, sample_steps=2, keep_last=1)  # fmt: skip
    return Command(["train.py", *flags(options)])


@pytest.fixture
def lora(faces, scratch, tmp_path) -> Command:
    options = plain(tiny_run(faces, Path()), "condition", "unet_dim", "dim_mults", "time_steps")
    options |= (
        LORA | on_scratch(scratch) | DREAMBOOTH | dict(train_steps=4, save_and_sample_every=4)
    )
    options |= dict(class_data="class", num_samples=0, sample_steps=2, log_every=1)
    options |= dict(cache_dir=str(tmp_path / "cache"))
    del options["default_caption"]
    return Command(["train.py", *flags(options)])


@pytest.fixture
def encoded(latent) -> Command:
    """A run of a step, its caches beside it."""
    options = latent | dict(cache_dir="cache", save_folder="run", num_samples=0, train_steps=1)
    return Command(["train.py", *flags(options)])


@pytest.fixture
def sampling(model) -> Command:
    return Command(["sample.py", "--load_path", model, "--num_images", 5, "--batch_size", 2, "--steps", 2,
                    "--save_folder", "out", "--device", "cpu", "--amp", "no", "--overwrite"])  # fmt: skip


@pytest.fixture
def looking(model) -> Command:
    return Command(["visualize.py", "--load_path", model, "--data", "toy", "--num_images", 1, "--steps", 2, "--html",
                    "--save_folder", "out", "--device", "cpu", "--overwrite"])  # fmt: skip


def tuned(sd_folder, faces, where: Path) -> Path:
    """A model.pt of a step on a Stable Diffusion."""
    options = plain(tiny_run(faces, where)) | dict(
        mode="latent", sd_path=sd_folder, condition="text", num_samples=0
    )
    options = {k: v for k, v in options.items() if k not in ("unet_dim", "dim_mults", "time_steps")}
    options |= dict(train_steps=1, save_and_sample_every=1, image_size=32, batch_size=2)
    done = warm.script("train.py", *flags(options), cwd=where)
    assert done.returncode == 0, done.stderr
    return where / "run" / "model.pt"


def test_some_faults_of_a_run(pixel, folder):
    assert disturb(pixel, folder, some(2, 60)) == 2


@pytest.mark.slow
def test_every_fault_of_a_run(pixel, folder):
    print(disturb(pixel, folder, ALL, ERRORS))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_every_fault_of_two_ranks(pixel, folder, rank):
    pixel.ranks = 2
    print(disturb(pixel, folder, ALL, rank=rank))


@pytest.mark.slow
@pytest.mark.parametrize("ranks, rank", [(0, 0), (2, 0), (2, 1)])
def test_every_fault_of_a_lora_with_class_images(lora, folder, ranks, rank):
    lora.ranks = ranks
    print(disturb(lora, folder, ALL, rank=rank))


@pytest.mark.slow
def test_every_fault_of_caches(encoded, folder):
    print(disturb(encoded, folder, ALL, ERRORS))


@pytest.mark.slow
def test_every_fault_of_sampling(sampling, folder):
    print(disturb(sampling, folder, ALL, ERRORS))


@pytest.mark.slow
def test_every_fault_of_visualize(looking, folder):
    print(disturb(looking, folder, ALL, ERRORS))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["made", "made.safetensors"])
def test_every_fault_of_export(sd_folder, faces, folder, tmp_path, target):
    model = tuned(sd_folder, faces, tmp_path)
    export = Command(["diffusion.export", model, target])
    print(disturb(export, folder, ALL, ERRORS))
