"""Learned tables: the learner on data with an exact denoiser, the file, and the commands."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from PIL import Image

import diffusion
from diffusion import UserError, learn_table
from diffusion.commands import sample as sample_command
from diffusion.config import Config
from diffusion.files.checkpoint import save_weights
from diffusion.files.table_files import read_table
from diffusion.learn_table import learn, with_one_state
from diffusion.models.build import build_pixel_unet
from diffusion.process.loop import differentiable_loop, sample
from diffusion.process.names import SAMPLERS
from diffusion.process.samplers import make_table
from diffusion.process.schedule import SPACINGS, make_path

D = 16
CENTRES = torch.nn.functional.normalize(
    torch.randn(12, D, generator=torch.Generator().manual_seed(0)), dim=1
)


class Mixture:
    """Give E[x0 | x] of twelve Gaussians of deviation 0.15 at distance 2 from 0."""

    def coefficients(self, t, alpha, sigma):
        return torch.stack([alpha, sigma, alpha, sigma], 1)

    def __call__(self, x, k):
        alpha, sigma = k[:2]
        variance = (0.15 * alpha) ** 2 + sigma**2
        off = x[:, None] - 2 * alpha * CENTRES
        share = (-0.5 * off.square().sum(-1) / variance).softmax(1)
        means = 2 * CENTRES + 0.15**2 * alpha / variance * off
        return (share[..., None] * means).sum(1)


def noise(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def end(x, table):
    *_, (y, _) = differentiable_loop(Mixture(), x, table, clip=False)
    return y


def rms(a, b) -> float:
    return (a - b).square().mean().sqrt().item()


@pytest.mark.parametrize(("name", "steps"), [("vp", 4), ("vp", 6), ("vp", 8), ("flow", 6)])
def test_a_learned_table_beats_every_sampler_on_noise_that_it_did_not_see(name, steps):
    path = make_path(name, 1000, "v")
    taught, unseen = noise(256, 1), noise(512, 2)
    exact = make_table(path, "unipc3", 200, spacing="logsnr")
    targets, ends = (sample(Mixture(), x, exact, clip=False) for x in (taught, unseen))
    by_name = {
        (name, spacing): rms(
            sample(Mixture(), unseen, make_table(path, name, steps, spacing=spacing), clip=False),
            ends,
        )
        for name, info in SAMPLERS.items()
        if info.eta == 0
        for spacing in SPACINGS
    }
    best = min(by_name, key=by_name.get)
    assert best[0] == "unipc2"
    batches = [range(i, i + 64) for i in range(0, 256, 64)] * 20
    start = with_one_state(make_table(path, best[0], steps, spacing=best[1]))
    table = learn(lambda table, batch: end(taught[batch], table), targets, start, path, batches)
    assert len(table) == steps
    learned = rms(sample(Mixture(), unseen, table, clip=False), ends)
    assert learned < 0.75 * by_name[best], (learned, by_name[best])


@pytest.mark.parametrize("path", ["vp", "flow", "edm"])
def test_unipcs_two_states_are_one(path):
    """The corrected state is the predicted one and differences of past x0."""
    table = make_table(make_path(path, 1000, "v"), "unipc2", 7, spacing="flow")
    one = with_one_state(table)
    assert torch.equal(one.to_x, one.to_y)
    x = noise(8, 0) * table.levels[0, 1]
    ends = [sample(Mixture(), x, t, clip=False) for t in (table, one)]
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_loop_are_finite_differences():
    path = make_path("vp", 1000, "v")
    start = make_table(path, "adams4", 5, spacing="logsnr")
    x = noise(8, 0)

    def error(rows):
        table = replace(start, to_x=rows, to_y=rows)
        return end(x, table).double().square().mean()

    rows = start.to_x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(error(rows), rows)
    for i, column in ((0, 0), (2, 2), (4, 3)):
        step = torch.zeros_like(rows)
        step[i, column] = 1e-2
        slope = (error(rows + step) - error(rows - step)) / 2e-2
        torch.testing.assert_close(gradient[i, column], slope, rtol=2e-2, atol=1e-3)


# --- the file and the commands ----------------------------------------------------------------


def tiny(folder, seed: int, **options):
    """Save a model of a network that knows nothing; give its file."""
    config = Config(image_size=16, unet_dim=8, dim_mults=(1, 2), heads=2, time_steps=20, **options)
    torch.manual_seed(seed)
    classes = ["a", "b"] if config.condition == "class" else []
    model = build_pixel_unet(8, (1, 2), heads=2, num_classes=len(classes))
    torch.nn.init.normal_(model.out.weight, std=0.1)
    file = folder / f"model_{seed}.safetensors"
    save_weights(file, model.state_dict(), config, step=1, classes=classes)
    return file


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A class-conditional model, and a table of three rows at guidance 2, made by the command."""
    folder = tmp_path_factory.mktemp("learned")
    model = tiny(folder, 0, condition="class")
    command = ["learn_table", str(model), "--steps", "3", "--guidance_scale", "2", "--amp", "no"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learn_table, "TEACHER", ("unipc2", 8))
        patch.setattr(learn_table, "JUDGED", 8)
        patch.setattr(learn_table, "EPOCHS", 5)
        patch.setattr(sys, "argv", command)
        learn_table.main()
    assert sorted(folder.iterdir()) == [model, folder / "table_3.json"]
    return model, folder / "table_3.json"


def test_the_command_writes_what_samples_the_model(learned):
    model, file = learned
    about = json.loads(file.read_text())["taught_by"]
    assert about["psnr"] > about["psnr_before"] and about["teacher"] == ["unipc2", 8]
    table, _ = read_table(file)
    assert len(table) == 3 and table.weight.tolist() == [2, 2, 2]
    pipeline = diffusion.load(model)
    given = dict(sampler=str(file), guidance_scale=2.0, labels=torch.tensor([0, 1]), amp="no")
    torch.testing.assert_close(
        pipeline.sample([0, 1], **given),
        pipeline.sample([0, 1], **given | {"table": table}),
        rtol=0, atol=0,
    )  # fmt: skip


def test_sample_takes_the_guidance_of_the_file(learned, tmp_path, monkeypatch):
    model, file = learned
    line = f"--load_path {model} --sampler {file} --class_label all --num_images 2"
    line += f" --save_folder {tmp_path / 'out'}"
    assert sample_command.parse(line.split()).guidance_scale == 2
    done = subprocess.run(
        [sys.executable, "sample.py", *line.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    text = Image.open(tmp_path / "out" / "images" / "000001.png").text["parameters"]
    assert "Steps: 3, Sampler: table_3, CFG scale: 2" in text


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(guidance_scale=3.0), "guidance_scale 2"),
        (dict(guidance_scale=2.0, guidance_interval=(0.1, 1.0)), "interval"),
        (dict(guidance_scale=2.0, steps=4), "--steps"),
        (dict(guidance_scale=2.0, spacing="karras"), "--spacing"),
        (dict(guidance_scale=2.0, eta=0.5), "--eta"),
        (dict(guidance_scale=2.0, strength=0.5), "--strength"),
    ],
)
def test_other_settings_are_refused(learned, options, word):
    model, file = learned
    with pytest.raises(ValueError, match=word):
        diffusion.load(model).frames([0], sampler=str(file), labels=torch.tensor([0]), **options)


def test_another_model_is_refused(learned, tmp_path):
    _, file = learned
    other = diffusion.load(tiny(tmp_path, 1, condition="class"))
    with pytest.raises(UserError, match="another model"):
        other.table(str(file))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: json.dumps(json.loads(text) | {"rows": []}),
        lambda text: json.dumps(json.loads(text) | {"rows": [[]]}),
        lambda text: json.dumps(json.loads(text) | {"rows": [[1.0] * 10]}),
        lambda text: json.dumps(json.loads(text) | {"rows": [[1.0] * 11, [1.0] * 10]}),
        lambda text: json.dumps(json.loads(text) | {"rows": [["one"] * 11]}),
        lambda text: json.dumps(json.loads(text) | {"rows": [[1e300] * 11]}),
        lambda text: json.dumps(json.loads(text) | {"rows": [[float("nan")] * 11]}),
        lambda text: json.dumps(json.loads(text) | {"rows": None}),
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "model"}),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused(learned, tmp_path, change):
    file = tmp_path / "table.json"
    file.write_text(change(learned[1].read_text()))
    with pytest.raises(UserError, match=r"table\.json"):
        read_table(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="table.json"):
        read_table(tmp_path / "table.json")
