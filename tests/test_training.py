"""Training as a user runs it: what it writes, how it stops, resumes, splits and fails."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
import warm
from conftest import command, environment, script
from helpers import CPU, flags, run_lines, same, same_runs, tiny_run, wait_for_step
from torch.testing import assert_close

from diffusion import UserError
from diffusion.config import Config
from diffusion.files import checkpoint
from diffusion.process.schedule import make_schedule
from diffusion.runtime import cuda_graph
from diffusion.sampling.load import build_network
from diffusion.training import recipe as recipe_module
from diffusion.training import steps
from diffusion.training.ema import EMA
from diffusion.training.optimizer import AdamW, flat
from diffusion.training.recipe import heldout_loss, open_recipe
from diffusion.training.steps import BatchSplit, draw, learning_rate, split_batch, total_steps
from diffusion.training.train_step import TrainStep, not_captured
from diffusion.training.trainer import train

# --- what a run writes -----------------------------------------------------------------------------


def test_a_run_writes_what_is_promised(tiny, tmp_path):
    train(Config(**tiny, keep_last=2))
    folder = tmp_path / "run"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "step_00000008.pt",
        "step_00000012.pt",
    ]
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [
        f"step_{s:08d}.png" for s in (4, 8, 12)
    ]
    modes = {
        (folder / name).stat().st_mode for name in ("config.json", "model.pt", "ema.safetensors")
    }
    assert len(modes) == 1  # whoever may read one may read all
    assert json.loads((folder / "config.json").read_text())["unet_dim"] == 8
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["step"] == 12 and metadata["samples_seen"] == 96
    assert metadata["epoch"] == pytest.approx(96 / 118)
    lines = run_lines(folder)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert set(lines[0]) == {"step", "loss", "lr", "grad_norm", "skipped"}
    held = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
    assert len(held) == 3 and metadata["best_loss"] == min(held)
    best, _, about = checkpoint.load_weights(folder / "best.safetensors")
    assert about["classes"] == ["bald", "bob", "spiky"]
    assert about["step"] == [4, 8, 12][held.index(min(held))]
    ema = checkpoint.load_weights(folder / "ema.safetensors")[0]
    state = checkpoint.read(folder / "model.pt")
    same(ema, dict(state["ema"]))
    assert state["step"] == 12 and best.keys() == ema.keys()


def test_tensorboard_has_the_same_numbers(tiny, tmp_path):
    train(Config(**tiny))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss",
        "heldout_loss",
        "lr",
        "grad_norm",
        "img_per_s",
        "skipped",
    }
    assert events.Tags()["images"] == ["samples"]
    text = events.Tensors("config")[0].tensor_proto.string_val[0].decode()
    kept = checkpoint.read(tmp_path / "run" / "model.pt")["config"]
    assert json.loads(text) == json.loads(json.dumps(kept))
    lines = run_lines(tmp_path / "run")
    assert_close(
        [e.value for e in events.Scalars("loss")],
        [line["loss"] for line in lines],
        rtol=1e-6,
        atol=0,
    )
    assert [e.step for e in events.Images("samples")] == [4, 8, 12]


@pytest.mark.slow
def test_it_learns(tiny, tmp_path):
    """Well below the 0.79 of a network that puts out zero (L1 of v, of unit variance)."""
    options = dict(train_steps=150, log_every=50, save_and_sample_every=150, learning_rate=3e-3)
    train(Config(**tiny | options))
    losses = [line["loss"] for line in run_lines(tmp_path / "run")]
    assert losses[0] > losses[1] > losses[2] and losses[2] < 0.45


# --- resuming --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(faces, tmp_path_factory):
    """The run that was never stopped, in a process like those of the interrupted ones."""
    root = tmp_path_factory.mktemp("uninterrupted")
    options = tiny_run(faces, root) | dict(train_steps=40)
    done = warm.script("train.py", *flags(options), cwd=root)
    assert done.returncode == 0, done.stderr
    return root / "run"


def test_kill_9_and_continue_is_bit_for_bit(tiny, tmp_path, uninterrupted):
    """Killed three times at random moments, the same command ends in the same bits."""
    options = tiny | dict(train_steps=40)
    folder = tmp_path / "run"
    rng = random.Random(time.time_ns())
    moments = sorted(rng.sample(range(4, 38, 2), 3))
    for moment in moments:
        process = warm.Process("train.py", *flags(options), cwd=tmp_path)
        wait_for_step(folder, moment, process)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.wait()
    done = warm.script("train.py", *flags(options), cwd=tmp_path)
    assert done.returncode == 0 and "from step " in done.stdout, (moments, done.stderr)
    same_runs(folder, uninterrupted)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_saves_and_stops_cleanly(tiny, tmp_path, uninterrupted, number):
    options = tiny | dict(train_steps=40, save_and_sample_every=4)
    process = warm.Process("train.py", *flags(options), cwd=tmp_path)
    wait_for_step(tmp_path / "run", 6, process)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "at step " in printed
    assert checkpoint.read(tmp_path / "run" / "model.pt")["step"] >= 6
    done = warm.script("train.py", *flags(options), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    same_runs(tmp_path / "run", uninterrupted)


def test_tensorboard_is_cut_back_too(tiny, tmp_path):
    train(Config(**tiny))
    folder = tmp_path / "run"
    for name in ("checkpoints/step_00000012.pt", "model.pt"):
        (folder / name).unlink()
    train(Config(**tiny))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [2, 4, 6, 8, 10, 12]


def test_a_damaged_checkpoint_is_passed_over(tiny, tmp_path, capsys):
    train(Config(**tiny))
    folder = tmp_path / "run"
    whole = torch.load(folder / "model.pt", weights_only=True)
    os.truncate(folder / "checkpoints" / "step_00000012.pt", 5000)
    train(Config(**tiny))
    printed = capsys.readouterr()
    assert "step_00000012.pt" in printed.out and "from step 8" in printed.out
    same(checkpoint.read(folder / "model.pt")["model"], whole["model"])


def test_the_folder_contract(tiny, tmp_path, capsys):
    config = Config(**tiny)
    train(config)
    train(config)
    assert "12 steps" in capsys.readouterr().out
    train(dataclasses.replace(config, train_steps=16, log_every=4, num_workers=1))
    assert checkpoint.read(tmp_path / "run" / "model.pt")["step"] == 16
    with pytest.raises(
        UserError, match="(?s)learning_rate.*0.001.*0.1.*--load_path .*model.pt.*train_steps"
    ):
        train(dataclasses.replace(config, learning_rate=0.1))
    notes = tmp_path / "run" / "notes.txt"
    notes.write_text("mine")
    train(dataclasses.replace(config, learning_rate=0.1, overwrite=True))
    assert checkpoint.read(tmp_path / "run" / "model.pt")["config"]["learning_rate"] == 0.1
    assert notes.read_text() == "mine"


def test_load_path(tiny, tmp_path):
    train(Config(**tiny))
    own = tmp_path / "run" / "model.pt"
    train(Config(**tiny | dict(load_path=str(own), train_steps=14)))
    assert checkpoint.read(own)["step"] == 14
    new = Config(
        **tiny
        | dict(
            load_path=str(own), save_folder=str(tmp_path / "new"), train_steps=1, learning_rate=1e-9
        )
    )
    train(new)
    state = checkpoint.read(tmp_path / "new" / "model.pt")
    assert state["step"] == 1
    for a, b in zip(state["model"].values(), checkpoint.read(own)["ema"].values()):
        assert_close(a, b, rtol=0, atol=1e-6)
    train(dataclasses.replace(new, train_steps=2))  # the same command resumes
    with pytest.raises(UserError, match="--load_path .*--unet_dim 8 --dim_mults 1,2[ ;]") as caught:
        other = dict(unet_dim=16, dim_mults=(1, 2, 2), save_folder=str(tmp_path / "wide"))
        train(dataclasses.replace(new, **other))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    with pytest.raises(UserError, match="nowhere.pt"):
        train(dataclasses.replace(new, load_path="nowhere.pt", save_folder=str(tmp_path / "x")))


def test_other_files_in_the_data_folder_are_noticed(tiny, tmp_path, faces):
    data = tmp_path / "copy"
    shutil.copytree(faces, data)
    train(Config(**tiny | dict(data=str(data), train_steps=4)))
    os.utime(next(data.rglob("*.png")), ns=(1, 1))  # a new date alone does no harm
    train(Config(**tiny | dict(data=str(data), train_steps=5)))
    next(data.rglob("*.png")).unlink()
    with pytest.raises(UserError, match=f"--data {data} "):
        train(Config(**tiny | dict(data=str(data), train_steps=8)))


def test_two_runs_in_one_folder_are_refused(tiny, tmp_path):
    process = warm.Process("train.py", *flags(tiny | dict(train_steps=4000)), cwd=tmp_path)
    wait_for_step(tmp_path / "run", 2, process)
    second = warm.script("train.py", *flags(tiny), cwd=tmp_path)
    process.kill()
    process.wait()
    assert second.returncode == 1 and f"{tmp_path / 'run'}" in second.stderr


def test_a_full_disk_keeps_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    train(Config(**tiny | dict(train_steps=4)))
    real = torch.save

    def full(state, path):
        real(state, path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        train(Config(**tiny))
    monkeypatch.undo()
    folder = tmp_path / "run"
    assert checkpoint.read(folder / "model.pt")["step"] == 4
    assert not list(folder.rglob(".*.tmp"))
    train(Config(**tiny))
    assert checkpoint.read(folder / "model.pt")["step"] == 12


# --- ranks, batches, randomness -----------------------------------------------------------------------


def one_step_gradients(tmp_path, options, ranks) -> dict:
    """Weights after one step of SGD-like size are the gradients: lr 1, no clipping, no Adam."""
    out = tmp_path / f"grads_{ranks}_{options['grad_accum']}.pt"
    code = f"""
import torch
from diffusion.config import Config
from diffusion.runtime import distributed as dist
from diffusion.training import trainer
seen = {{}}
def total_norm(gradients, real=torch.nn.utils.get_total_norm):
    seen.setdefault("grads", [g.clone() for g in gradients])
    return real(gradients)
torch.nn.utils.get_total_norm = total_norm
trainer.train(Config(**{options!r}))
if dist.is_main():
    torch.save(seen["grads"], {str(out)!r})
dist.cleanup()
"""
    file = tmp_path / "one_step.py"
    file.write_text(code)
    done = warm.script(str(file), cwd=tmp_path, ranks=ranks if ranks > 1 else 0)
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


def test_two_ranks_and_accumulation_give_the_gradients_of_one(tiny, tmp_path):
    base = tiny | dict(
        train_steps=1, save_and_sample_every=1, num_samples=3, dropout=0.0, batch_size=8
    )
    cases = [(1, 1), (2, 1), (2, 2), (1, 4)]
    found = []
    for ranks, accum in cases:
        folder = str(tmp_path / f"run_{ranks}_{accum}")
        found.append(
            one_step_gradients(tmp_path, base | dict(grad_accum=accum, save_folder=folder), ranks)
        )
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in found[0]) > 1e-3


@pytest.mark.slow
def test_torchrun_resumes_on_another_number_of_ranks(tiny, tmp_path):
    done = script("train.py", *flags(tiny | dict(train_steps=8)), cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "samples" / "step_00000008.png").exists()
    alone = warm.script("train.py", *flags(tiny | dict(train_steps=12)), cwd=tmp_path)
    assert alone.returncode == 0 and "from step 8" in alone.stdout + alone.stderr
    lines = run_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]


@pytest.mark.slow
def test_torchrun_stops_on_a_signal(tiny, tmp_path):
    options = tiny | dict(train_steps=4000)
    process = subprocess.Popen(command("train.py", *flags(options), ranks=2), cwd=tmp_path, env=environment(2),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    wait_for_step(tmp_path / "run", 4, process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert "at step " in printed
    assert checkpoint.read(tmp_path / "run" / "model.pt")["step"] >= 4


def test_micro_batches_cover_the_batch(monkeypatch):
    split = BatchSplit(ranks=2, accum=3, micro=4)
    parts = [part for rank in range(2) for part in split.micro_batches(rank)]
    assert parts == [(i, i + 4) for i in range(0, 24, 4)]
    monkeypatch.setattr(steps.dist, "world_size", lambda: 8)
    assert split_batch(Config(batch_size=32, grad_accum=2)) == BatchSplit(8, 2, 2)
    with pytest.raises(UserError, match="batch_size 30 .*24 or 32"):
        split_batch(Config(batch_size=30))
    with pytest.raises(UserError, match="batch_size 4 .*16"):
        split_batch(Config(batch_size=4, grad_accum=2))


def test_draws_depend_on_seed_and_step_only():
    config = Config(batch_size=16)
    rest = (make_schedule("cosine", 50), (3, 8, 8))
    draws = [draw(config, *rest, step, CPU, 0) for step in (7, 7, *range(200))]
    a, b, c = draws[:3]
    assert all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("levels", "eps", "drop")
    )
    other_seed = draw(config, *rest, 7, CPU, seed=1)
    for other in (c, other_seed):
        assert not any(torch.equal(getattr(a, n), getattr(other, n)) for n in ("levels", "eps"))
    part = a[3:5]
    assert torch.equal(part.levels, a.levels[:, 3:5]) and torch.equal(part.eps, a.eps[3:5])
    assert torch.equal(part.drop, a.drop[3:5]) and part.vae_eps is None
    t = torch.cat([one.levels[3] for one in draws[2:]])
    assert t.min() == 0 and t.max() == 49
    dropped = torch.cat([one.drop for one in draws[2:]])
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.02)


def test_latent_runs_sample_their_latents_too():
    config = Config(batch_size=4, mode="latent", vae="x")
    rest = (make_schedule("cosine", 50), (4, 8, 8))
    a, b, c = (draw(config, *rest, step, CPU, 0).vae_eps for step in (1, 1, 2))
    assert a.shape == (4, 4, 8, 8) and torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(a, draw(config, *rest, 1, CPU, 0).eps)


# --- the parts of a step -------------------------------------------------------------------------------


def test_learning_rate_schedules():
    c = Config(learning_rate=1.0, lr_warmup_steps=10)
    assert [learning_rate(c, s, 110) for s in (0, 4, 9, 50, 109)] == [0.1, 0.5, 1, 1, 1]
    linear = dataclasses.replace(c, lr_schedule="linear")
    assert_close([learning_rate(linear, s, 110) for s in (9, 10, 60, 109)], [1.0, 1.0, 0.5, 0.01])
    cosine = dataclasses.replace(c, lr_schedule="cosine")
    assert_close(
        [learning_rate(cosine, s, 110) for s in (10, 35, 60)], [1.0, (2 + math.sqrt(2)) / 4, 0.5]
    )


def test_ema_follows_its_formula():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    expected = model.weight.detach().clone()
    for n in range(200):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.begin(n)
        ema.update(torch.tensor(n != 50))
        decay = min(0.9, (1 + n) / (10 + n)) if n != 50 else 1
        expected = decay * expected + (1 - decay) * model.weight.detach()
    assert_close(ema.model.weight, expected, rtol=1e-4, atol=1e-5)


def test_epochs():
    assert total_steps(Config(epochs=2.5, batch_size=32), 1000) == 79
    assert total_steps(Config(train_steps=7), None) == 7
    with pytest.raises(UserError, match="--train_steps"):
        total_steps(Config(epochs=1), None)


def poison(monkeypatch, steps):
    """Make the loss of these steps NaN."""
    real, count = recipe_module.training_loss, iter(range(10**6))

    def loss(*args, **options):
        value = real(*args, **options)
        # held-out losses come without gradients and do not count
        return value * float("nan") if value.requires_grad and next(count) in steps else value

    monkeypatch.setattr(recipe_module, "training_loss", loss)


def test_a_nonfinite_step_changes_nothing_and_is_counted(tiny, tmp_path, monkeypatch):
    options = tiny | dict(save_and_sample_every=1, num_samples=0, keep_last=20)
    poison(monkeypatch, {3, 4, 9})
    train(Config(**options))
    states = {
        s: checkpoint.read(tmp_path / "run" / "checkpoints" / f"step_{s:08d}.pt")
        for s in range(1, 13)
    }
    for before, after in ((3, 4), (4, 5), (9, 10)):
        for name in ("model", "ema", "optimizer"):
            a, b = (dict(states[s][name]) for s in (before, after))
            if name == "optimizer":
                a, b = a["state"], b["state"]
            same(a, b, name)
    assert not torch.equal(states[5]["model"]["out.weight"], states[6]["model"]["out.weight"])
    assert run_lines(tmp_path / "run")[-1]["skipped"] == 3
    assert states[12]["step"] == 12


def test_ten_nonfinite_steps_in_a_row_stop_the_run(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(5, 100)))
    with pytest.raises(UserError, match="10 .*--learning_rate"):
        train(Config(**tiny | dict(train_steps=100, save_and_sample_every=4)))
    state = checkpoint.read(tmp_path / "run" / "model.pt")
    assert all(v.isfinite().all() for v in state["model"].values())


def test_gradient_clipping_bounds_the_norm(tiny, tmp_path, monkeypatch):
    norms = []
    real = AdamW.step

    def step(self, *a, **k):
        norms.append(
            torch.nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g["params"]])
        )
        return real(self, *a, **k)

    monkeypatch.setattr(AdamW, "step", step)
    train(Config(**tiny | dict(grad_clip=0.01, train_steps=5)))
    assert_close(torch.stack(norms), torch.full((5,), 0.01), rtol=1e-3, atol=0)


def test_adamw_is_torchs():
    """On weights of every layout; also after moments were saved in the shape of the weights."""
    torch.manual_seed(0)
    shapes = [(8, 4, 3, 3), (6, 5), (7,), (4, 4, 1, 1), (3, 1, 3, 3), ()]
    start = [torch.randn(s) for s in shapes]
    start[0] = start[0].contiguous(memory_format=torch.channels_last)
    start[1] = start[1].T.contiguous().T
    ours, theirs = ([w.clone().requires_grad_() for w in start] for _ in range(2))
    optimizers = (
        AdamW(ours, 0.1, weight_decay=0.1),
        torch.optim.AdamW(theirs, 0.1, weight_decay=0.1),
    )

    def steps(n):
        for _ in range(n):
            for a, b in zip(ours, theirs):
                a.grad, b.grad = (torch.randn(a.shape).contiguous(),) * 2
            optimizers[0].take_gradients()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    steps(3)
    assert_close(ours, theirs)
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    steps(1)
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    steps(1)
    assert_close(ours, theirs)
    assert flat(ours[0], ours[0]).data_ptr() == ours[0].data_ptr()


def test_heldout_loss_is_fixed(tiny, tmp_path):
    recipe = open_recipe(Config(**tiny), CPU)
    model = recipe.build().eval()
    torch.nn.init.normal_(model.out.weight, std=0.1)  # a new network's output is zero
    values = [heldout_loss(recipe, model, micro) for micro in (1, 2, 8)]
    assert_close(values, [values[0]] * 3, rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [
    dict(objective="eps", loss="l1"), dict(objective="x0", loss="huber"), dict(zero_snr=True, schedule="linear"),
    dict(min_snr_gamma=5.0, lr_schedule="cosine"), dict(amp="bf16"), dict(cache=False, num_workers=0),
    dict(image_size=18, condition="none"), dict(grad_accum=4, checkpointing=True), dict(num_samples=0, grad_clip=0.0),
    dict(sampler="dpmpp_2m", guidance_scale=2.0),
], ids=str)  # fmt: skip
def test_options_run(tiny, tmp_path, options):
    train(Config(**tiny | dict(train_steps=3) | options))
    assert checkpoint.read(tmp_path / "run" / "model.pt")["step"] == 3


@pytest.mark.slow
def test_streaming_run_resumes_exactly(tiny, tmp_path, monkeypatch):
    library = pytest.importorskip(
        "datasets", reason="optional extra not installed: pip install datasets"
    )
    from pathlib import Path

    from diffusion.data.stream import StreamBatches

    files = sorted(Path(tiny["data"]).rglob("*.png"))
    features = library.Features({"image": library.Image()})
    images = [{"bytes": file.read_bytes(), "path": None} for file in files]
    made = library.Dataset.from_dict({"image": images}, features=features)
    (tmp_path / "hub").mkdir()
    made.to_parquet(tmp_path / "hub" / "train.parquet")
    monkeypatch.setattr(StreamBatches, "BLOCK", 16)
    monkeypatch.setattr(StreamBatches, "HELD_OUT", 20)
    options = tiny | dict(
        data=f"hf:{tmp_path / 'hub'}", streaming=True, condition="none", train_steps=30
    )
    train(Config(**options | dict(save_folder=str(tmp_path / "whole"))))
    train(Config(**options | dict(train_steps=18)))
    train(Config(**options))
    same(*[checkpoint.read(tmp_path / n / "model.pt")["model"] for n in ("run", "whole")])


@pytest.mark.slow
def test_compiled_training_runs(tiny, tmp_path):
    train(Config(**tiny | dict(train_steps=3, compile=True, dim_mults=(1, 2), num_samples=0)))
    assert set(checkpoint.read(tmp_path / "run" / "model.pt")["model"]) == set(
        build_network(Config(**tiny), 3).state_dict()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["no", "bf16", "fp16"])
def test_gpu_training_and_resume(tiny, tmp_path, amp):
    options = tiny | dict(device="cuda", amp=amp)
    train(Config(**options))
    train(Config(**options | dict(train_steps=16)))
    assert all(math.isfinite(line["loss"]) for line in run_lines(tmp_path / "run"))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gpu_steps_as_graphs_are_the_steps_without(tiny, tmp_path, dropout):
    options = tiny | dict(device="cuda", amp="bf16", dropout=dropout, train_steps=8)
    options["grad_accum"] = 2
    for name in ("on", "off"):
        folder = str(tmp_path / name)
        train(Config(**options | dict(cuda_graph=name, save_folder=folder)))
    graph, eager = (run_lines(tmp_path / name) for name in ("on", "off"))
    for a, b in zip(graph, eager, strict=True):
        assert_close(a["loss"], b["loss"], rtol=1e-3, atol=0)
    on, off = (checkpoint.read(tmp_path / n / "model.pt")["ema"] for n in ("on", "off"))
    for name, weight in on.items():
        assert_close(weight, off[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("memory", [True, False])
def test_steps_are_a_graph_from_the_fourth_on_where_memory_suffices(monkeypatch, memory):
    calls, graphs = [], []

    class Stream:
        def wait_stream(self, other):
            pass

    class Recorded:
        def __init__(self, function, inputs, **options):
            assert options["warm_up"] == 0
            graphs.append(inputs[0].shape)
            if not memory:
                try:
                    raise torch.cuda.OutOfMemoryError("full")
                finally:  # as torch does where the capture it ends has failed
                    raise RuntimeError("the capture failed")
            self.function = function

        def __call__(self, *inputs):
            self.function(*inputs)

    monkeypatch.setattr("diffusion.runtime.cuda_graph.Graph", Recorded)
    for name, stand_in in (
        ("Stream", Stream),
        ("current_stream", Stream),
        ("stream", lambda _: contextlib.nullcontext()),
        ("graph_pool_handle", lambda: None),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    step = cuda_graph.StepGraph(lambda x: calls.append(x.sum().item()))
    for i in range(6):
        step(torch.full((2,), float(i)))
    step(torch.ones(3))  # other shapes: from the start
    assert calls == [0, 2, 4, 6, 8, 10, 3]
    assert graphs == [(2,)]
    assert len(step.graphs) == memory


def test_a_step_forgets_gradients_that_a_capture_left(tiny):
    recipe = open_recipe(Config(**tiny), CPU)
    moved = []
    for stale in (False, True):
        torch.manual_seed(0)
        model = recipe.build()
        optimizer = AdamW(model.parameters(), 1e-3, betas=(0.9, 0.99))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        parts = (model, optimizer, scaler, EMA(model, 0.9), steps.StepStats(CPU), None)
        draws = recipe.draw(0)
        inputs = recipe.inputs_of(0, recipe.batches(0, 0, 8), draws, 0, 8)
        for p in model.parameters():
            p.grad = torch.ones_like(p) if stale else None
        torch.manual_seed(1)
        TrainStep(recipe, *parts)([inputs])
        moved.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *moved))


def test_where_steps_are_no_graphs(tiny):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    reason = lambda device, dtype, **o: not_captured(Config(**tiny | o), device, dtype)  # noqa: E731
    assert reason(cuda, torch.bfloat16) is None and reason(cuda, None) is None
    assert "cpu" in reason(cpu, None)
    assert "float16" in reason(cuda, torch.float16)
    assert "checkpointing" in reason(cuda, None, checkpointing=True)
    assert "off" in reason(cuda, None, cuda_graph="off")
    with pytest.raises(UserError, match="cuda_graph"):
        reason(cpu, None, cuda_graph="on")


def test_overwrite_deletes_nothing_before_all_is_checked(tiny, tmp_path):
    train(Config(**tiny | dict(train_steps=2)))
    for wrong in (
        dict(data="nowhere"),
        dict(load_path="nowhere.pt"),
        dict(batch_size=7, grad_accum=2),
    ):
        with pytest.raises(UserError):
            train(Config(**tiny | dict(overwrite=True) | wrong))
    assert (tmp_path / "run" / "model.pt").exists()
    with pytest.raises(UserError, match="--overwrite .*--load_path"):
        train(
            Config(
                **tiny | dict(overwrite=True, load_path=str(tmp_path / "run" / "ema.safetensors"))
            )
        )


def test_a_wrong_sampling_setting_shows_before_training(tiny, tmp_path):
    with pytest.raises(UserError, match="--condition class"):
        train(Config(**tiny | dict(condition="none", guidance_scale=3.0)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_kill_before_the_last_checkpoint_redoes_the_last_step(tiny, tmp_path, monkeypatch):
    """Weights and pictures come before the checkpoint, so that no finished run lacks them."""
    real = checkpoint.save

    def die(folder, state, keep):
        if state["step"] == 12:
            raise KeyboardInterrupt
        return real(folder, state, keep)

    monkeypatch.setattr(checkpoint, "save", die)
    with pytest.raises(KeyboardInterrupt):
        train(Config(**tiny))
    monkeypatch.undo()
    train(Config(**tiny))
    folder = tmp_path / "run"
    assert json.loads((folder / "metadata.json").read_text())["step"] == 12
    assert [line["step"] for line in run_lines(folder)] == [2, 4, 6, 8, 10, 12]
    same(
        checkpoint.load_weights(folder / "ema.safetensors")[0],
        dict(checkpoint.read(folder / "model.pt")["ema"]),
    )


def test_a_kill_between_the_last_checkpoint_and_model_pt(tiny, tmp_path):
    """The finished run's model.pt is its last checkpoint all the same."""
    config = Config(**tiny | dict(train_steps=8, save_and_sample_every=4))
    train(config)
    folder = tmp_path / "run"
    (folder / "model.pt").unlink()
    shutil.copy(folder / "checkpoints" / "step_00000004.pt", folder / "model.pt")
    train(config)
    assert checkpoint.read(folder / "model.pt")["step"] == 8


def test_keep_last_one_after_a_damaged_checkpoint(tiny, tmp_path):
    train(Config(**tiny | dict(train_steps=8)))
    damaged = tmp_path / "run" / "checkpoints" / "step_00000099.pt"
    damaged.write_bytes(b"half")
    train(Config(**tiny | dict(train_steps=12, keep_last=1)))
    left = sorted(p.name for p in damaged.parent.iterdir())
    assert left == ["step_00000012.pt", "step_00000099.damaged"]  # it may be good for something


def test_losses_of_bad_steps_do_not_spoil_the_mean(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 6, 7})
    train(Config(**tiny | dict(train_steps=10)))
    lines = {line["step"]: line for line in run_lines(tmp_path / "run")}
    assert (
        math.isfinite(lines[4]["loss"])
        and lines[8]["loss"] is None
        and lines[8]["grad_norm"] is None
    )
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and lines[10]["skipped"] == 3


@pytest.mark.gpu
def test_a_gpu_step_never_waits_for_the_device(tiny, monkeypatch):
    """Between log lines nothing synchronises host and device."""
    real_draw, real_read = recipe_module.draw, steps.StepStats.read

    def strict_draw(config, schedule, shape, step, *rest):
        torch.cuda.set_sync_debug_mode("error" if step % 2 == 1 else "default")
        return real_draw(config, schedule, shape, step, *rest)

    def read(self):
        torch.cuda.set_sync_debug_mode("default")
        return real_read(self)

    monkeypatch.setattr(recipe_module, "draw", strict_draw)
    monkeypatch.setattr(steps.StepStats, "read", read)
    train(Config(**tiny | dict(device="cuda", amp="bf16", dropout=0.0)))
