"""Faults of a running training: killed, stopped, out of disk, damaged files, clocks, memory."""

import hashlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import time
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_sd
import torch
import warm
from helpers import on_scratch, plain, run_lines, same, same_runs, tiny_run

from diffusion import UserError
from diffusion.config import Config
from diffusion.files import checkpoint, tensors
from diffusion.files.atomic import read_lines
from diffusion.files.tensors import read_content
from diffusion.sampling.pipeline import Pipeline
from diffusion.training import faults, trainer
from diffusion.training.optimizer import AdamW
from diffusion.training.trainer import train

# --- killed ----------------------------------------------------------------------------------------

KINDS = ("step", "checkpoint", "cache", "sampling", "SIGTERM", "SIGINT twice")


def started(options: dict, output: Path, place: str | None = None, n: int = 0):
    return warm.forked("run", options, str(output), place, n)


def ended(process, seconds: float = 120) -> int:
    process.join(seconds)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def last_step(folder: Path) -> int:
    lines = read_lines(folder / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def kill(options: dict, output: Path, kind: str, rng: random.Random) -> bool:
    """One fault at a random moment; False if the run was done before it."""
    folder, cache_dir = Path(options["save_folder"]), Path(options["cache_dir"])
    most = {"checkpoint": 24, "cache": 118, "latents": 14, "sampling": 8}
    if kind in most:
        if kind in ("cache", "latents"):
            shutil.rmtree(cache_dir, ignore_errors=True)
        process = started(options, output, kind, rng.randint(1, most[kind]))
        return ended(process) == -signal.SIGKILL
    aim, process = last_step(folder) + rng.randint(1, 6), started(options, output)
    while last_step(folder) < aim and process.is_alive():
        time.sleep(0.002)
    time.sleep(rng.random() * 0.03)
    for number in {"step": [signal.SIGKILL], "SIGTERM": [signal.SIGTERM],
                   "SIGINT twice": [signal.SIGINT, signal.SIGINT]}[kind]:  # fmt: skip
        if process.is_alive():
            os.kill(process.pid, number)
            time.sleep(rng.random() * 0.01)
    code = ended(process)
    assert code in {"step": (-9, 0), "SIGTERM": (0, -15), "SIGINT twice": (0, 130, -2, 1)}[kind], (
        code, output.read_text()[-2000:])  # fmt: skip
    return checkpoint.newest(folder, print) is None or not finished(folder, options)


def finished(folder: Path, options: dict) -> bool:
    state = checkpoint.newest(folder, print)
    return state is not None and state["step"] >= options["train_steps"]


def check_whole(folder: Path) -> None:
    """What a reader finds between two attempts: whole files only."""
    for name in ("model.pt", "ema.safetensors", "best.safetensors"):
        if (folder / name).exists():
            checkpoint.load_weights(folder / name)


def one_run(options: dict, folder: Path, faults_to_come: list[str], seed: int) -> Counter:
    """A run with these faults one after the other, and then to its end."""
    options, rng = options | {"save_folder": str(folder)}, random.Random(seed)
    output, seen = folder.with_suffix(".log"), Counter()
    for kind in faults_to_come:
        seen[kind] += kill(options, output, kind, rng)
        check_whole(folder)
        if finished(folder, options):
            break
    assert ended(started(options, output)) == 0, output.read_text()[-3000:]
    assert "Traceback" not in output.read_text()
    return seen


@pytest.fixture
def whole(tiny, quick_path):
    """(options, folder of the run that nothing happened to)."""
    options = tiny | dict(train_steps=40, save_folder=str(quick_path / "whole"), log_every=1,
                          cache_dir=str(quick_path / "cache"), dim_mults=(1,), heads=1,
                          num_samples=2, sample_steps=3)  # fmt: skip
    assert ended(started(options, quick_path / "whole.log")) == 0
    return options, quick_path / "whole"


def test_each_kind_of_kill_once(whole, quick_path):
    """The short version: the same command goes on, to the same bits and the same lines."""
    options, expected = whole
    seed = time.time_ns() % 10**6
    seen = one_run(options, quick_path / "run", list(KINDS), seed)
    same_runs(quick_path / "run", expected)
    assert sum(seen.values()) >= len(KINDS) - 1, (seed, seen)


@pytest.mark.slow
def test_fifty_kills(whole, quick_path):
    options, expected = whole
    rng, seen, seed = random.Random(), Counter(), time.time_ns() % 10**6
    while sum(seen.values()) < 50:
        seed += 1
        order = rng.sample(KINDS * 2, 2 * len(KINDS))
        seen += one_run(options, quick_path / f"run{seed}", order, seed)
        same_runs(quick_path / f"run{seed}", expected)
    print(dict(seen))
    assert min(seen[kind] for kind in KINDS) >= 3, seen


@pytest.mark.slow
def test_latent_runs_killed_while_they_encode_and_train(tiny, quick_path, vae):
    options = tiny | dict(
        mode="latent", vae=str(vae), condition="text", text_encoder="scratch", text_dim=32,
        text_layers=1, text_length=64, layers_per_block=1, unet_dim=16, dropout=0.0, log_every=1,
        heads=4, train_steps=24, cache_dir=str(quick_path / "cache"), save_folder=str(quick_path / "whole"),
    )  # fmt: skip
    assert ended(started(options, quick_path / "whole.log")) == 0
    order = ["latents", "step", "latents", "checkpoint", "sampling", "SIGTERM"]
    seen = one_run(options, quick_path / "run", order, time.time_ns() % 10**6)
    same_runs(quick_path / "run", quick_path / "whole")
    assert sum(seen.values()) >= 4, seen


# --- damaged checkpoints ------------------------------------------------------------------------------


@pytest.fixture
def three(tiny, tmp_path, model):
    """A folder with three checkpoints, of steps 20, 40 and 60."""
    state, folder = checkpoint.read(model), tmp_path / "three"
    folder.mkdir()
    for step in (20, 40, 60):
        checkpoint.save(folder, state | {"step": step}, keep_last=3)
    return folder


def resumed(folder: Path) -> tuple[int, list[str]]:
    """The step a run would go on from, and what it says."""
    told: list[str] = []
    return checkpoint.newest(folder, told.append)["step"], told


@pytest.mark.parametrize("percent", range(0, 100, 10))
def test_a_truncated_checkpoint(three, percent):
    """model.pt is the same file as the newest: both are passed over, and the next one is named."""
    newest = three / "checkpoints" / "step_00000060.pt"
    os.truncate(newest, newest.stat().st_size * percent // 100)
    step, told = resumed(three)
    assert step == 40 and "step_00000060.pt" in told[0] and "using" in told[1]
    assert "step_00000040.pt, the newest that is intact" in told[1]


def records(file: Path) -> dict[str, range]:
    """Where the bytes of each entry of a zip file are."""
    data = file.read_bytes()
    found = {}
    with zipfile.ZipFile(file) as z:
        for entry in z.infolist():
            name, extra = struct.unpack("<HH", data[entry.header_offset + 26 :][:4])
            start = entry.header_offset + 30 + name + extra
            found[entry.filename] = range(start, start + entry.file_size)
    return found


def test_a_flipped_bit_in_any_record_is_noticed(three):
    """torch itself reads these without a word, weights changed: the CRC of the zip file tells."""
    newest = three / "checkpoints" / "step_00000060.pt"
    data, rng = newest.read_bytes(), random.Random(0)
    found = records(newest)
    assert len(found) > 50
    chosen = rng.sample(sorted(found), 40) + [name for name in found if "/data/" not in name]
    for where in (rng.choice(found[name]) for name in chosen):
        bad = bytearray(data)
        bad[where] ^= 1 << rng.randrange(8)
        newest.write_bytes(bad)
        with pytest.raises(UserError, match="step_00000060.pt is (damaged|truncated)"):
            checkpoint.read(newest)
    assert resumed(three)[0] == 40
    newest.write_bytes(data)
    assert resumed(three) == (60, [])


@pytest.mark.slow
def test_a_flipped_bit_between_the_records_is_noticed_or_changes_nothing(tmp_path):
    state = {"weight": torch.randn(4, 5), "config": {"data": "faces"}, "rng": torch.get_rng_state()}
    file = tmp_path / "a.pt"
    torch.save(state, file)
    data, rng, noticed = file.read_bytes(), random.Random(0), 0
    inside = {where for span in records(file).values() for where in span}
    for where in set(range(len(data))) - inside:
        bad = bytearray(data)
        bad[where] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        try:
            found, _ = read_content(file, check_crc=True)
        except UserError:
            noticed += 1
        else:
            assert found["config"] == state["config"]
            assert all(torch.equal(found[k], state[k]) for k in ("weight", "rng"))
    assert noticed > 500


def test_checkpoints_with_the_seal_of_before_are_read(three):
    """Their zip comment is a SHA-256, which nothing reads any more."""
    newest = three / "checkpoints" / "step_00000060.pt"
    data = newest.read_bytes()
    comment = b"sha256:" + hashlib.sha256(data[:-2]).hexdigest().encode()
    newest.write_bytes(data[:-2] + struct.pack("<H", len(comment)) + comment)
    assert resumed(three) == (60, [])


def test_a_flipped_bit_in_shared_weights_is_noticed(model, tmp_path):
    data, rng = (model.parent / "ema.safetensors").read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    file = tmp_path / "ema.safetensors"
    for where in rng.sample(range(header, len(data)), 20) + rng.sample(range(8, header), 100):
        bad = bytearray(data)
        bad[where] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(UserError, match="damaged|NaN|of this version"):
            checkpoint.load_weights(file)


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_passing_fault_is_no_damage(three, monkeypatch, error):
    """Else the run would go on from an older checkpoint, over a good one."""
    real = tensors.read_zip

    def read_zip(path, *rest):
        if path.name == "step_00000060.pt":
            raise error
        return real(path, *rest)

    monkeypatch.setattr(tensors, "read_zip", read_zip)
    with pytest.raises(UserError, match="step_00000060.pt could not be read"):
        resumed(three)
    monkeypatch.setattr(tensors, "read_zip", real)
    assert resumed(three)[0] == 60


def test_overwrite_is_done_once(tiny, tmp_path, monkeypatch):
    """torchrun and Slurm repeat the command after a fault, with its --overwrite."""
    options = tiny | dict(overwrite=True, num_samples=0)
    train(Config(**options | dict(train_steps=4)))
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            train(Config(**options | dict(train_steps=8)))
    assert [line["step"] for line in run_lines(tmp_path / "run")] == [2, 4, 6, 8]
    train(Config(**options | dict(train_steps=2)))
    assert [line["step"] for line in run_lines(tmp_path / "run")] == [2]


def test_a_finished_run_completes_what_it_shares(tiny, tmp_path):
    """Killed after its last checkpoint, a run leaves model.pt and the rest as of the one before."""
    folder = tmp_path / "run"
    names = ("model.pt", "ema.safetensors", "best.safetensors", "metadata.json")
    options = tiny | dict(num_samples=0, train_steps=8)
    train(Config(**options | dict(train_steps=4)))
    before = {name: (folder / name).read_bytes() for name in names}
    train(Config(**options))
    expected = [checkpoint.load_weights(folder / name) for name in names[:3]]
    assert expected[2][2]["step"] == 8  # the best one
    for name, content in before.items():
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    (folder / ".ema.safetensors.0123456789abcdef.tmp").write_bytes(b"half")
    train(Config(**options))
    for name, (weights, _, about) in zip(names, expected):
        found, _, told = checkpoint.load_weights(folder / name)
        same(found, weights)
        assert told == about
    assert json.loads((folder / "metadata.json").read_text())["step"] == 8
    assert not list(folder.rglob("*.tmp"))
    assert [line["step"] for line in run_lines(folder)] == [2, 4, 6, 8]


def test_a_copy_of_model_outlives_a_damaged_checkpoint(tiny, tmp_path):
    """Where there are no hard links, model.pt may be the only good file of the last step."""
    folder = tmp_path / "run"
    options = tiny | dict(num_samples=0, train_steps=4)
    train(Config(**options))
    good = (folder / "model.pt").read_bytes()
    os.truncate(folder / "checkpoints" / "step_00000004.pt", 1000)
    (folder / "model.pt").unlink()
    (folder / "model.pt").write_bytes(good)
    train(Config(**options))
    assert (folder / "model.pt").read_bytes() == good


def test_class_images_are_sampled_in_the_batches_of_before(tiny, tmp_path, scratch, monkeypatch):
    """In a smaller batch, an image can be another by rounding: after a kill others would be trained on."""
    seen = []
    real = Pipeline.sample_batch

    def sample(self, indices, **options):
        seen.append(list(indices))
        return real(self, indices, **options)

    monkeypatch.setattr(Pipeline, "sample_batch", sample)
    options = plain(tiny, "condition", "unet_dim", "dim_mults", "time_steps") | on_scratch(scratch)
    options |= dict(instance_prompt="sks face", class_prompt="a face", class_images=11, train_steps=1, num_samples=0,
                    class_data=str(tmp_path / "class"))  # fmt: skip
    train(Config(**options))
    folder = tmp_path / "class"
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    assert seen == [list(range(8)), [8, 9, 10]] and len(before) == 11
    (folder / "00010.png").unlink()
    half = folder / ".00010.png.0123456789abcdef.tmp"
    half.write_bytes(b"half")
    train(Config(**options | dict(save_folder=str(tmp_path / "again"))))
    assert seen[2:] == [[8, 9, 10]] and not half.exists()
    after = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["00010.png"] and before["00010.png"][0] == after["00010.png"][0]


def test_what_a_killed_writer_has_left_is_removed(tiny, tmp_path):
    train(Config(**tiny | dict(train_steps=4, num_samples=0)))
    left = [
        tmp_path / "run" / ".model.pt.tmp",
        tmp_path / "run" / "checkpoints" / ".step_00000009.pt.tmp",
        tmp_path / "run" / "samples" / ".step_00000009.png.77.tmp",
    ]
    left[-1].parent.mkdir()
    for file in left:
        file.write_bytes(b"half")
    train(Config(**tiny | dict(train_steps=6, num_samples=0)))
    assert not any(file.exists() for file in left)


def test_all_checkpoints_damaged(three):
    for file in [*three.glob("checkpoints/*"), three / "model.pt"]:
        os.truncate(file, 1000)
    with pytest.raises(UserError, match="none of the 4 checkpoints in .* can be read"):
        resumed(three)


def test_older_good_ones_outlive_a_damaged_newer_one(tiny, tmp_path):
    """What is deleted is what lies beyond the step that the run went on from, and the oldest."""
    folder = tmp_path / "run"
    train(Config(**tiny | dict(train_steps=12, num_samples=0)))
    newest = folder / "checkpoints" / "step_00000012.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    before = {p.name: p.read_bytes() for p in folder.glob("checkpoints/*")}
    train(Config(**tiny | dict(train_steps=9, num_samples=0)))
    assert checkpoint.read(folder / "model.pt")["step"] == 9
    for name in ("step_00000004.pt", "step_00000008.pt"):
        assert (folder / "checkpoints" / name).read_bytes() == before[name]
    assert not newest.exists()  # it could not be read, and the run will write it anew


def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path, monkeypatch):
    """A finite gradient can still bring an infinite weight: the good checkpoints stay."""
    train(Config(**tiny | dict(train_steps=8)))
    real = AdamW.step

    def step(self, *args, **kwargs):
        real(self, *args, **kwargs)
        with torch.no_grad():
            self.param_groups[0]["params"][0].flatten()[0] = float("inf")

    monkeypatch.setattr(AdamW, "step", step)
    with pytest.raises(UserError, match="weights of step 12 are not finite and are not saved"):
        train(Config(**tiny))
    folder = tmp_path / "run"
    assert [checkpoint.read(f)["step"] for f in checkpoint.step_files(folder)] == [8, 4]
    assert checkpoint.read(folder / "model.pt")["step"] == 8


# --- disks, folders, clocks ------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, size: str):
    """A file system of its own; skips where that is not permitted."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder],
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(
    "share", [0.7, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.5, 0.6, 0.8, 0.9))]
)
def test_a_disk_that_fills_up(tiny, tmp_path, share):
    """At whatever byte: one line, the last checkpoint whole, and with space the same end."""
    options = tiny | dict(cache_dir=str(tmp_path / "cache"), train_steps=16, keep_last=9)
    whole = tmp_path / "whole"
    train(Config(**options | dict(save_folder=str(whole))))
    used = sum(f.stat().st_size for f in whole.rglob("*") if f.is_file() and f.name != "model.pt")
    with mounted(tmp_path / "disk", f"{int(used * share)}") as disk:
        folder = disk / "run"
        for _ in range(2):  # and when it is started again without more space
            with pytest.raises(UserError, match="(?i)no space left.*resumes"):
                train(Config(**options | dict(save_folder=str(folder))))
        assert not list(folder.rglob(".*.tmp"))
        state = checkpoint.newest(folder, print)
        assert state is not None and 4 <= state["step"] < 16
        subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
        train(Config(**options | dict(save_folder=str(folder))))
        same(checkpoint.read(folder / "model.pt")["model"],
             checkpoint.read(whole / "model.pt")["model"])  # fmt: skip
        assert run_lines(folder) == run_lines(whole)


def test_a_read_only_folder_is_told_before_the_work(tiny, tmp_path):
    with mounted(tmp_path / "disk", "9m") as disk:
        options = tiny | dict(save_folder=str(disk / "run"), cache_dir=str(tmp_path / "cache"))
        train(Config(**options | dict(train_steps=4)))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(UserError, match="cannot be written.*Read-only"):
            train(Config(**options))
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        train(Config(**options))
        assert checkpoint.read(disk / "run" / "model.pt")["step"] == 12


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, faces) -> Path:
    """The model.pt of a run of two steps on a tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "sd").mkdir()
    tiny_sd.save_folder(folder / "sd")
    options = plain(tiny_run(faces, folder), "unet_dim", "dim_mults", "time_steps", "condition")
    options |= dict(mode="latent", sd_path=str(folder / "sd"), condition="text", objective="eps", image_size=32,
                    train_steps=1, save_and_sample_every=1, num_samples=0, batch_size=2)  # fmt: skip
    train(Config(**options))
    return folder / "run" / "model.pt"


def written_to(kind: str, disk: Path, request) -> list:
    """A command that writes to this folder."""
    if kind.startswith("export"):
        return ["diffusion.export", request.getfixturevalue("tuned"), disk / kind.split(" ")[1]]
    data, model = request.getfixturevalue("faces"), request.getfixturevalue("model")
    if kind == "evaluation":
        pooled = request.getfixturevalue("pooled")
        return ["diffusion.evaluation", data, model, "--fid_features", pooled, "--num_images", 4, "--samplers",
                "ddim:2", "--device", "cpu", "--save_folder", disk]  # fmt: skip
    if kind == "study":
        return ["diffusion.study", "--load_path", request.getfixturevalue("scratch"), "--data", data, "--save_folder",
                disk, "--device", "cpu", "--steps", 2, "--num_images", 2]  # fmt: skip
    if kind == "visualize":
        return [
            "visualize.py",
            "--data",
            "toy",
            "--num_images",
            1,
            "--device",
            "cpu",
            "--save_folder",
            disk / "out",
        ]
    return ["sample.py", "--load_path", model, "--num_images", 2, "--steps", 2, "--device", "cpu", "--save_folder", disk / "out"]  # fmt: skip


@pytest.mark.parametrize("state", ["full", "read-only"])
@pytest.mark.parametrize("kind", [
    "sample", *(pytest.param(k, marks=pytest.mark.slow) for k in
                ("visualize", "export made", "export made.safetensors", "evaluation", "study")),
])  # fmt: skip
def test_a_disk_that_cannot_be_written_is_one_line(request, tmp_path, kind, state):
    with mounted(tmp_path / "disk", "2m") as disk:
        name, *args = written_to(kind, disk, request)
        if state == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        else:
            with pytest.raises(OSError), open(disk / "filler", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 12))
        done = warm.script(name, *args, cwd=tmp_path)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
        said = done.stderr.rpartition("error: ")[2]
        assert len(said.splitlines()) == 1 and str(disk) in said, done.stderr
        assert "pace left" in said or "Read-only" in said


def when(monkeypatch, step: int, act) -> None:
    """Do something at a step of the run."""
    real = trainer.learning_rate

    def learning_rate(config, at, total):
        if at == step:
            act()
        return real(config, at, total)

    monkeypatch.setattr(trainer, "learning_rate", learning_rate)


def test_a_folder_removed_under_the_run(tiny, tmp_path, monkeypatch):
    """It is not silently made again, half a run in it."""
    folder = tmp_path / "run"
    when(monkeypatch, 6, lambda: folder.exists() and shutil.rmtree(folder))
    with pytest.raises(UserError, match="step .*run was removed"):
        train(Config(**tiny))
    assert not (folder / "model.pt").exists()


def test_a_clock_set_back(tiny, tmp_path, monkeypatch):
    """During the run and before it goes on: the numbers and TensorBoard's curves are the same."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Config(**tiny | dict(save_folder=str(tmp_path / "whole"))))
    real, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() - shift[0])
    when(monkeypatch, 5, lambda: shift.__setitem__(0, 3600.0))
    train(Config(**tiny | dict(train_steps=10)))
    for name in ("checkpoints/step_00000010.pt", "model.pt"):
        (tmp_path / "run" / name).unlink()
    shift[0] = 1e8
    train(Config(**tiny))
    same_runs(tmp_path / "run", tmp_path / "whole")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [2, 4, 6, 8, 10, 12]
    assert all(line["img_per_s"] > 0 for line in read_lines(tmp_path / "run" / "metrics.jsonl"))


# --- memory ------------------------------------------------------------------------------------------


def test_out_of_memory_says_what_helps(tiny, tmp_path, monkeypatch):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    when(monkeypatch, 6, fail)
    with pytest.raises(UserError) as caught:
        train(Config(**tiny | dict(grad_accum=2)))
    message = str(caught.value)
    del caught  # its traceback holds the run's lock
    assert "\n" not in message
    for part in ("step 6", "micro-batch of 4", "--grad_accum", "--checkpointing", "--amp auto"):
        assert part in message
    monkeypatch.undo()
    train(Config(**tiny | dict(grad_accum=2, num_samples=0)))  # it goes on from step 4
    assert [line["step"] for line in run_lines(tmp_path / "run")] == [2, 4, 6, 8, 10, 12]


def test_out_of_memory_is_recognized():
    assert faults.is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:  # more than any machine has
        torch.empty(1 << 60, dtype=torch.uint8)
    assert faults.is_out_of_memory(caught.value)


def leak(options: dict, measure) -> list[tuple[int, int]]:
    """(step, bytes) at each fiftieth step of 2,000."""
    seen: list[tuple[int, int]] = []
    real = trainer.learning_rate

    def learning_rate(config, step, total):
        if step % 50 == 0 and (not seen or seen[-1][0] != step):
            seen.append((step, measure()))
        return real(config, step, total)

    trainer.learning_rate = learning_rate
    try:
        train(Config(**options | dict(train_steps=2000, save_and_sample_every=100, log_every=10)))
    finally:
        trainer.learning_rate = real
    return seen


def check_steady(seen: list[tuple[int, int]], most: int) -> None:
    """The last quarter against the second: caches and arenas fill in the first."""
    values = [size for _, size in seen]
    n = len(values) // 4
    early, late = max(values[n : 2 * n]), max(values[3 * n :])
    print(f"{early / 2**20:.0f} MB, then {late / 2**20:.0f} MB")
    assert late - early < most, seen


@pytest.mark.slow
def test_memory_is_steady_over_2000_steps(tiny, quick_path):
    options = tiny | dict(save_folder=str(quick_path / "run"), dim_mults=(1,), heads=1,
                          cache_dir=str(quick_path / "cache"))  # fmt: skip

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    check_steady(leak(options, resident), 24 << 20)


@pytest.mark.gpu
def test_gpu_memory_is_steady_over_2000_steps(tiny, tmp_path):
    options = tiny | dict(device="cuda", amp="bf16")
    check_steady(leak(options, torch.cuda.memory_reserved), 8 << 20)
