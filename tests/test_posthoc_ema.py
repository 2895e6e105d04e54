"""Post-hoc EMA: power-function averages, their snapshots, and any length made of them."""

import dataclasses
import sys

import pytest
import torch
from helpers import same, same_runs
from safetensors.torch import load_file
from torch.testing import assert_close

from diffusion import UserError
from diffusion.config import Config
from diffusion.files import checkpoint
from diffusion.files.checkpoint import load_weights
from diffusion.training import posthoc_ema
from diffusion.training.ema import EMA, TRACKS, power
from diffusion.training.trainer import train

STEPS, EVERY = 4000, 50
LENGTHS = (0.03, 0.04, 0.05, 0.07, 0.12, 0.15, 0.2)


class Weights(torch.nn.Module):
    """One weight that trains, and one that does not."""

    def __init__(self):
        super().__init__()
        self.moving = torch.nn.Parameter(torch.zeros(200))
        self.fixed = torch.nn.Parameter(torch.full((2,), 1 / 3), requires_grad=False)


def make(monkeypatch, folder, *options):
    monkeypatch.setattr(sys, "argv", ["posthoc_ema", str(folder), *map(str, options)])
    posthoc_ema.main()


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """(folder of a run, the weights, directly kept averages by length) of a noisy random walk."""
    folder = tmp_path_factory.mktemp("walk")
    torch.manual_seed(0)
    model = Weights()
    path = torch.cumsum(torch.randn(STEPS, 200) * 0.02, 0) + torch.randn(STEPS, 200) * 0.3
    ema = EMA(model, 0.9999)
    ema.tracks = [EMA(model, 1, length) for length in TRACKS]
    direct = {length: EMA(model, 1, length) for length in LENGTHS}
    config = Config(posthoc_ema=True)
    for n in range(STEPS):
        model.moving.data.copy_(path[n])
        for average in (ema, *direct.values()):
            average.begin(n)
        for average in (*ema.tracks, *direct.values()):
            average.update()
        if (n + 1) % EVERY == 0:
            posthoc_ema.keep(folder, n + 1, config, ema.tracks)
    state = dict(step=STEPS, config=config.shared(), classes=[], best_loss=None)
    checkpoint.save(folder, state | dict(model=model.state_dict(), ema=model.state_dict()), 1)
    return folder, model, direct


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_the_length_is_the_deviation_of_the_profile(sigma_rel):
    """t^gamma on [0, 1] is the density of Beta(gamma + 1, 1)."""
    profile = torch.distributions.Beta(torch.tensor(power(sigma_rel)).double(), 1.0)
    assert_close(profile.stddev.item(), sigma_rel)


def test_a_power_function_average_follows_its_formula():
    """beta_t = (1 - 1/t)^(gamma+1), also at the steps that change nothing."""
    torch.manual_seed(0)
    model = Weights()
    average = EMA(model, 1, 0.1)
    expected = torch.randn(200)  # of no account: beta_1 is 0
    for t in range(1, 100):
        if t != 50:
            model.moving.data += torch.randn(200)
        average.begin(t - 1)
        average.update()
        beta = (1 - 1 / t) ** 7.937  # gamma of 0.1 is 6.94 (arXiv:2312.02696, section 3.1)
        expected = beta * expected + (1 - beta) * model.moving.data
    assert_close(average.ema[0].data, expected, rtol=1e-3, atol=1e-3)
    assert average.names == ["moving"]


@pytest.mark.parametrize("sigma_rel", LENGTHS)
def test_any_length_is_made_of_snapshots(walk, sigma_rel, monkeypatch):
    folder, model, direct = walk
    make(monkeypatch, folder, "--sigma_rel", sigma_rel)
    weights, config, about = load_weights(folder / f"ema_{sigma_rel:.3f}.safetensors")
    expected = direct[sigma_rel].ema[0]
    error = (weights["moving"] - expected).norm() / (expected - model.moving).norm()
    assert error < 0.01
    assert about["step"] == STEPS and config.posthoc_ema
    assert torch.equal(weights["fixed"], model.fixed)  # not rounded to float16


def test_snapshots_are_thinned_out_evenly(walk):
    files = checkpoint.step_files(walk[0], posthoc_ema.FILES)
    steps = sorted(posthoc_ema.step_of(file) for file in files)
    gaps = [b - a for a, b in zip([0, *steps], steps)]
    assert len(steps) == 32 and steps[-1] == STEPS
    assert max(gaps) <= 4 * min(gaps) and max(gaps) <= 2 * STEPS / 32
    assert {value.dtype for value in load_file(files[0]).values()} == {torch.float16}


@pytest.mark.parametrize(
    "steps", [[1000, 500], [*range(1000, 0, -40)], [400_000, 399_000, 200_000]]
)
def test_the_coefficients_are_least_squares(steps):
    """Of profiles on a grid, under the condition that the sum is 1; a kept length is exact."""
    s = torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:, None] - 1 / 40_000
    t = torch.tensor(steps).double().repeat_interleave(2) / steps[0]
    p = torch.tensor([power(length) for length in TRACKS]).double().repeat(len(steps))
    profiles = p * s ** (p - 1) / t**p * (s <= t)
    for sigma_rel in (0.03, *TRACKS, 0.07, 0.2):
        wanted = power(sigma_rel) * s[:, 0] ** (power(sigma_rel) - 1)
        first = profiles[:, 0]
        others = torch.linalg.lstsq(profiles[:, 1:] - first[:, None], wanted - first).solution
        expected = torch.cat([1 - others.sum(0, keepdim=True), others])
        x = posthoc_ema.solve(steps, sigma_rel).flatten()
        assert_close(x.sum().item(), 1.0, rtol=0, atol=1e-5)
        missed, least = ((profiles @ c - wanted).norm() / wanted.norm() for c in (x, expected))
        assert missed <= least + 1e-4
        if sigma_rel in TRACKS:
            assert_close(x[TRACKS.index(sigma_rel)].item(), 1.0, rtol=0, atol=1e-4)


def test_killed_between_snapshot_and_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    """A run that goes on from an older checkpoint ends with the same averages and snapshots."""
    options = tiny | dict(posthoc_ema=True, num_samples=0, train_steps=16, save_and_sample_every=1)
    whole, killed = tmp_path / "a" / "run", tmp_path / "b" / "run"
    train(Config(**options | dict(save_folder=str(whole))))
    real = checkpoint.save

    def save(folder, state, keep_last):
        if state["step"] == 8:
            raise MemoryError
        return real(folder, state, keep_last)

    config = Config(**options | dict(save_folder=str(killed)))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises((UserError, MemoryError)):
            train(config)
    assert checkpoint.read(killed / "model.pt")["step"] == 7
    train(config)
    same_runs(whole, killed)
    ours, theirs = (checkpoint.step_files(folder, posthoc_ema.FILES) for folder in (whole, killed))
    assert [file.name for file in ours] == [file.name for file in theirs] and len(ours) == 16
    for one, other in zip(ours, theirs):
        same(load_file(one), load_file(other))
    tracks = checkpoint.read(whole / "model.pt")["tracks"]
    for name, pair in load_file(ours[0]).items():  # the newest is the tracks' last state
        assert_close(pair, torch.stack([track[name] for track in tracks]).half(), rtol=0, atol=0)

    # --best is the length of the lowest held-out loss
    capsys.readouterr()
    make(monkeypatch, whole, "--best")
    *lines, last = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("sigma_rel")]
    losses = {float(row[1].rstrip(":")): float(row[-1]) for row in rows}
    best = min(losses, key=losses.get)
    file = whole / f"ema_{best:.3f}.safetensors"
    # outside of a clone the program is the one that is installed
    assert len(losses) == 6 and last == f"next: diffusion-sample --load_path {file}"
    found = load_file(file)
    make(monkeypatch, whole, "--sigma_rel", best)
    same(found, load_file(file))
    assert load_weights(file)[2]["classes"] == ["bald", "bob", "spiky"]


def test_errors(walk, tmp_path, monkeypatch):
    folder, model, _ = walk
    checkpoint.save(tmp_path, checkpoint.read(folder / "model.pt"), 1)
    tracks = [EMA(model, 1, length) for length in TRACKS]
    config = Config(posthoc_ema=True)
    for count in (0, 15):
        for step in range(count):
            posthoc_ema.keep(tmp_path, STEPS - step, config, tracks)
        with pytest.raises(UserError, match=f"{count} snapshots.*--posthoc_ema"):
            make(monkeypatch, tmp_path, "--sigma_rel", 0.1)
    posthoc_ema.keep(tmp_path, 1, dataclasses.replace(config, seed=1), tracks)
    with pytest.raises(UserError, match="step_00000001.safetensors is of another run"):
        make(monkeypatch, tmp_path, "--sigma_rel", 0.1)
    for sigma_rel in (0.01, 0.3):
        with pytest.raises(UserError, match=f"sigma_rel is {sigma_rel}"):
            make(monkeypatch, tmp_path, "--sigma_rel", sigma_rel)
    for options in ([], ["--best", "--sigma_rel", 0.1]):
        with pytest.raises(SystemExit):
            make(monkeypatch, tmp_path, *options)
    for options in (dict(mode="vae"), dict(adapter="lora", mode="latent")):
        with pytest.raises(UserError, match="posthoc_ema"):
            Config(posthoc_ema=True, **options).check_use({"posthoc_ema"})
