"""Guidance: its interval, another model for its guide, what it costs, and what does not fit."""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import stand_in_for_graphs, tiny_run
from PIL import Image
from torch.testing import assert_close

from diffusion import UserError
from diffusion.config import Config, config_from_args
from diffusion.process.loop import guided, sample
from diffusion.process.objective import Denoiser
from diffusion.process.samplers import make_table
from diffusion.process.schedule import make_path, make_schedule
from diffusion.sampling.conditioning import Unconditional
from diffusion.sampling.load import build_network, load, open_pipeline, path_of
from diffusion.sampling.pipeline import Pipeline, check_guide
from diffusion.training.recipe import open_recipe

CPU = torch.device("cpu")
SMALL = dict(image_size=16, unet_dim=8, dim_mults=(1, 2), heads=2, time_steps=20)


def pipeline_of(seed: int, **options) -> Pipeline:
    """A network without labels, with random weights."""
    config = Config(**SMALL | options)
    torch.manual_seed(seed)
    model = build_network(config, 0).eval()
    torch.nn.init.normal_(model.out.weight, std=0.05)
    return Pipeline(config, model, path_of(config), conditioning=Unconditional())


@pytest.fixture
def call(monkeypatch):
    """sample.py's main in this process."""
    from diffusion.commands import sample

    def main(*args):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
        sample.main()

    return main


# --- a mixture, whose models are known in closed form ---------------------------------------------

CENTRES = torch.tensor([[0.0, 1.0], [-0.9, -0.5], [0.9, -0.5]])
FRACTIONS = torch.tensor([0.5, 0.3, 0.2])
STD = 0.1


def log_terms(x, alpha, variance):
    """log of fraction times density at x (B, 2) of each mode, (B, 3)."""
    squares = (x[:, None] - alpha * CENTRES).square().sum(2)
    return FRACTIONS.log() - squares / (2 * variance) - math.log(2 * math.pi) - math.log(variance)


def blurred(path, std):
    """E[x0 | x_t] of the mixture whose modes have this std: a network that predicts x0."""

    def network(x, t):
        alpha, sigma = (float(v) for v in path.at(t[:1].double()))
        x = x.flatten(1)
        variance = alpha**2 * std**2 + sigma**2
        mode = log_terms(x, alpha, variance).softmax(1)
        towards = alpha * std**2 / variance * (x[:, None] - alpha * CENTRES)
        return (mode[..., None] * (CENTRES + towards)).sum(1)[..., None, None]

    return network


def test_autoguidance_of_a_mixture():
    """Away from a more blurred model: denser samples, as many of each mode (arXiv:2406.02507)."""
    path = make_schedule("cosine", 1000)
    model, guide = blurred(path, 2 * STD), blurred(path, 4 * STD)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(10_000, 2, 1, 1, generator=g)
    denoise = partial(Denoiser, schedule=path, objective="x0")
    table = make_table(path, "dpmpp_2m", 60)
    found = {}
    for scale in (1.0, 2.0):
        x = sample(
            denoise(model),
            noise,
            table.guided(scale),
            guided=denoise(guided(model, guide), weighted=True),
            clip=False,
        ).flatten(1)
        terms = log_terms(x, 1.0, STD**2)
        counts = terms.argmax(1).bincount(minlength=3)
        found[scale] = (terms.logsumexp(1).mean().item(), counts / len(x))
    # of the model alone: log-density at a mean square distance of 2 (2 STD)^2 from a mode
    spread = (FRACTIONS * FRACTIONS.log()).sum() - math.log(2 * math.pi * STD**2)
    assert_close(found[1.0][0], float(spread) - 4, rtol=0.05, atol=0)
    assert found[2.0][0] > found[1.0][0] + 1
    assert_close(found[1.0][1], FRACTIONS, rtol=0, atol=0.02)
    assert_close(found[2.0][1], FRACTIONS, rtol=0, atol=0.02)


# --- which steps are guided, and what they cost ---------------------------------------------------


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
@pytest.mark.parametrize("sampler", ["ddim", "unipc2", "heun"])
def test_the_interval_is_of_sigma_over_alpha(name, sampler):
    path = make_path(name, 1000, "v", zero_snr=name == "vp")
    table = make_table(path, sampler, 12)
    assert_close(table.guided(3.0).weight, torch.full_like(table.t, 3.0))
    low, high = 0.3, 40.0
    ratios = [math.inf if a == 0 else float(s / a) for a, s in table.levels[:-1]]
    expected = [3.0 if low <= ratio <= high else 1.0 for ratio in ratios]
    assert {1.0, 3.0} == set(expected)
    assert table.guided(3.0, (low, high)).weight.tolist() == expected
    assert table.guided(3.0, ()).weight.tolist() == [3.0] * len(table)
    with pytest.raises(ValueError, match="0.0001 to 0.0002 .*12 steps"):
        table.guided(3.0, (1e-4, 2e-4))


def test_steps_outside_the_interval_call_the_network_once(model):
    pipeline = load(model)
    sizes = []
    pipeline.model.register_forward_hook(lambda _, given, out: sizes.append(len(out)))
    options = dict(sampler="dpmpp_2m", steps=10, labels=torch.tensor([0, 1]), amp="no")
    levels = pipeline.table("dpmpp_2m", 10).levels[:-1]
    ratio = levels[:, 1] / levels[:, 0]
    interval = (float(ratio[6]) * 0.99, float(ratio[3]) * 1.01)  # rows 3 to 6
    pipeline.sample(range(2), guidance_scale=3.0, guidance_interval=interval, **options)
    assert sizes == [2, 2, 2, 4, 4, 4, 4, 2, 2, 2]
    sizes.clear()
    pipeline.sample(
        range(2), guidance_scale=3.0, guidance_interval=interval, batched=False, **options
    )
    assert sizes == [2] * 14
    sizes.clear()
    pipeline.guide = load(model, "raw")
    guides = []
    pipeline.guide.model.register_forward_hook(lambda _, given, out: guides.append(len(out)))
    pipeline.sample(range(2), guidance_scale=3.0, guidance_interval=interval, **options)
    assert sizes == [2] * 10 and guides == [2] * 4
    pipeline.sample(range(2), **options)
    assert len(guides) == 4  # at scale 1 it is not asked


def test_an_interval_of_all_levels_is_none(model):
    pipeline = load(model)
    options = dict(labels=torch.tensor([1]), guidance_scale=2.0, steps=5, amp="no")
    every, some, off = (
        pipeline.sample([0], guidance_interval=interval, **options)
        for interval in (None, (0.2, 2.0), (0.0, 1e9))
    )
    assert torch.equal(every, off) and not torch.allclose(every, some, atol=1e-3)


def test_graphs_of_plain_and_guided_steps(model, monkeypatch):
    """With a stand-in for the capture: two functions for a guide, none again for another scale."""
    captured = stand_in_for_graphs(monkeypatch)
    plain, pipeline, guide = load(model), load(model), load(model, "raw")
    options = dict(steps=6, labels=torch.tensor([1, 0]), guidance_interval=(0.3, 3.0))
    other = load(model)
    for one, scale, count in ((None, 2.0, 2), (None, 3.0, 2), (guide, 3.0, 4), (other, 3.0, 6)):
        plain.guide = pipeline.guide = one
        got = pipeline.sample(range(2), cuda_graph=True, guidance_scale=scale, **options)
        assert torch.equal(got, plain.sample(range(2), guidance_scale=scale, **options))
        assert len(captured) == count


# --- the guide ------------------------------------------------------------------------------------


def test_a_guide_takes_the_place_of_the_call_without_condition(monkeypatch):
    """One step, x0 = guide + w (model - guide): the objective's x0 is linear in the output."""
    model, guide = pipeline_of(0), pipeline_of(1, unet_dim=16, dim_mults=(1,))  # of another size
    monkeypatch.setattr(type(model.codec), "clip", False)
    options = dict(sampler="ddim", steps=1, amp="no")
    own, others = (p.sample(range(2), **options) for p in (model, guide))
    with pytest.raises(UserError, match="--guide"):
        model.sample(range(2), guidance_scale=2.5, **options)
    model.guide = guide
    expected = others + 2.5 * (own - others)
    got = model.sample(range(2), guidance_scale=2.5, **options)
    assert not torch.allclose(got, own, atol=1e-2)
    assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.sample(range(2), **options), own)
    model.guide = pipeline_of(0)  # the same model: away from itself is nowhere
    assert_close(model.sample(range(2), guidance_scale=2.5, **options), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [
    dict(objective="eps"), dict(image_size=32), dict(time_steps=30), dict(path="flow"),
    dict(schedule="linear"), dict(zero_snr=True), dict(condition="class"),
], ids=str)  # fmt: skip
def test_a_guide_of_another_kind_is_refused(changes):
    (name, value), *_ = changes.items()
    config = Config(**SMALL | changes)
    other = Pipeline(config, torch.nn.Linear(1, 1), path_of(config))
    model = pipeline_of(0)
    own = getattr(model.config, name)
    with pytest.raises(UserError, match=f"{name} is {value!r}.*{own!r}"):
        check_guide(model, other)
    check_guide(model, pipeline_of(1, noise_dist="lognormal", loss="l2", dropout=0.1))


def test_a_guide_has_the_same_classes(model):
    pipeline, guide = load(model), load(model)
    check_guide(pipeline, guide)
    guide.conditioning = replace(guide.conditioning, classes=["x", "y"])
    with pytest.raises(UserError, match="classes .*'x', 'y'.*'bob'"):
        check_guide(pipeline, guide)


# --- the commands ---------------------------------------------------------------------------------


def test_sample_takes_a_guide_and_an_interval(model, tmp_path, call):
    common = ["--load_path", model, "--amp", "no", "--device", "cpu", "--num_images", 1]
    common += ["--class_label", "bob", "--steps", 5, "--weights", "raw"]
    guided = ["--guidance_scale", 2, "--guidance_interval", 0.2, 2]
    guided += ["--guide", model.parent / "ema.safetensors"]
    call(*common, *guided, "--save_folder", tmp_path)
    image = Image.open(tmp_path / "images" / "000000.png")
    text = image.text["parameters"]
    assert 'Guidance interval: "[0.2, 2.0]"' in text and f"Guide: {model.parent.name}/ema" in text
    pipeline = load(model, "raw")
    pipeline.guide = load(model.parent / "ema.safetensors")
    options = dict(labels=torch.tensor([list(pipeline.classes).index("bob")]), steps=5, amp="no")
    x = pipeline.sample([0], guidance_scale=2.0, guidance_interval=(0.2, 2.0), **options)
    expected = ((x[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).round()
    found = torch.from_numpy(np.array(image))
    assert (found - expected).abs().max() <= 1


@pytest.mark.parametrize("args, named", [
    ("--guide {model}", "guidance_scale"), ("--guidance_interval 0.2 5", "guidance_scale"),
    ("--guidance_scale 2 --guidance_interval 5 0.2", "guidance_interval is"),
    ("--guidance_scale 2 --guidance_interval -1 2", "guidance_interval is"),
    ("--guidance_scale 2 --guidance_interval nan 2", "guidance_interval is"),
    ("--guidance_scale 2 --guidance_interval 1e-4 2e-4 --class_label bob", "0.0001 to 0.0002"),
    ("--guidance_scale 2 --guide {model} --sequential_guidance", "sequential_guidance.*--guide"),
    ("--guidance_scale 2 --guide {model}x", "modelx|model.ptx"),
])  # fmt: skip
def test_mistakes_of_sample(model, tmp_path, call, args, named):
    args = [arg.format(model=model) for arg in args.split()]
    with pytest.raises(UserError, match=named):
        call("--load_path", model, "--device", "cpu", "--save_folder", tmp_path / "s", *args)
    assert not (tmp_path / "s").exists()


def test_the_raw_weights_may_guide(model):
    file = str(model)
    found = open_pipeline(file, None, None, CPU, guide=file).guide
    raw, ema = load(model, "raw").model.state_dict(), load(model).model.state_dict()
    assert_close(found.model.state_dict(), raw, rtol=0, atol=0)
    found = open_pipeline(file, None, None, CPU, guide=str(model.parent / "ema.safetensors")).guide
    assert_close(found.model.state_dict(), ema, rtol=0, atol=0)


def test_options_of_training():
    config = config_from_args(dict(guidance_scale=2.0, guidance_interval=[0.2, 5.0], guide="a/b"))
    assert config.guidance_interval == (0.2, 5.0)
    stored = config.shared()
    assert Config.from_dict(stored | {"guidance_interval": [0.2, 5.0]}) == config
    assert Config.from_dict({}).guidance_interval == ()  # of runs from before there was one
    assert not config.differences(config_from_args({}))  # a run may be continued with others
    assert Config(guide=str(Path.home() / "x" / "model.pt")).shared()["guide"] == "model.pt"
    for wrong in ([5.0, 0.2], [-1.0, 1.0], [0.2, math.nan], ["a", "b"]):
        with pytest.raises(UserError, match="guidance_interval is"):
            Config.from_dict({"guidance_interval": wrong})
    for name, value in (("guidance_interval", (0.2, 5.0)), ("guide", "x")):
        with pytest.raises(UserError, match=f"--{name}.*guidance_scale"):
            Config(**{name: value}).check_use([name])


def test_sample_grids_are_guided(model, faces, tmp_path):
    options = tiny_run(faces, tmp_path) | dict(num_samples=3, guidance_scale=3.0, dropout=0.0)
    network = load(model).model
    grids = {}
    for name, more in {
        "plain": {},
        "interval": dict(guidance_interval=(0.2, 1.0)),
        "guide": dict(guide=str(model.parent)),
    }.items():
        recipe = open_recipe(Config(**options | more), CPU)
        recipe.check(network)
        grids[name] = recipe.sample_grid(network, 3).tobytes()
    assert len(set(grids.values())) == 3
    config = Config(**options | dict(guidance_scale=1.0))
    assert open_recipe(config, CPU).sample_grid(network, 3).tobytes() == grids["guide"]  # itself
    other = Config(**options | dict(guide=str(model), time_steps=30))
    with pytest.raises(UserError, match="sample grids: the guide's time_steps is 20.*30"):
        open_recipe(other, CPU).check(network)


def test_a_guide_reads_the_prompts_itself(scratch, model):
    """The study's base model, with a text encoder that was trained along."""
    from diffusion.study import __main__ as program

    given = f"--load_path {scratch} --data x --guidance_scale 2 --guide {scratch}"
    s, *_ = program.parse([*given.split(), "--guidance_interval", "0.1", "9"])
    pipeline = program.open_base(s, CPU)
    embed = pipeline.guide.conditioning.embed
    read = []
    object.__setattr__(
        pipeline.guide.conditioning, "embed", lambda *given: read.append(given[0]) or embed(*given)
    )
    options = dict(prompts=["bald", "bob"], steps=3, amp="no")
    own = pipeline.sample(range(2), guidance_scale=1.0, **options)
    away = pipeline.sample(range(2), guidance_scale=3.0, **options)
    assert read == [["bald", "bob"]] and away.isfinite().all() and not torch.equal(own, away)
    s, *_ = program.parse([*given.split()[:-1], str(model)])
    with pytest.raises(UserError, match="cannot be sampled: the guide's mode is 'pixel'.*'latent'"):
        program.open_base(s, CPU)


def test_the_study_passes_them_on(tmp_path):
    from diffusion.commands import sample as command
    from diffusion.study import __main__ as program
    from diffusion.study.plan import Cell
    from diffusion.study.runner import sample_arguments, train_arguments

    given = "--load_path base.pt --data x --guidance_scale 2 --guidance_interval 0.2 5 --guide g.pt"
    s, *_ = program.parse(given.split())
    s.image_size = 16
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    parsed = command.parse(sample_arguments(s, Cell("base", "base", "a"), [], prompts, tmp_path))
    assert parsed.guidance_interval == [0.2, 5.0] and parsed.guide == "g.pt"
    cell = Cell("lora", "lora", "a", 3, 1e-3, 2)
    trains = train_arguments(s, cell, "a", tmp_path, tmp_path, tmp_path)
    assert not any("guid" in arg for arg in trains)
    with pytest.raises(UserError, match="--guide.*guidance_scale"):
        program.parse("--load_path a --data x --guidance_scale 1 --guide g".split())
