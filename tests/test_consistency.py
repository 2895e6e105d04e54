"""Easy consistency tuning: its levels, its loss on Gaussian data, and runs of --consistency."""

import math
import shutil

import pytest
import torch
from helpers import same_runs
from test_training import one_step_gradients
from torch import nn
from torch.testing import assert_close

from diffusion import UserError, load
from diffusion.config import Config
from diffusion.files import checkpoint
from diffusion.process.consistency import consistency_coefficients, consistency_loss
from diffusion.process.names import SAMPLERS
from diffusion.process.objective import OBJECTIVES, Denoiser, x0_coefficients
from diffusion.process.samplers import D0, MAKERS, NOISE, make_table
from diffusion.process.schedule import edm, make_path, spread
from diffusion.training.steps import loss_coefficients
from diffusion.training.trainer import train

STD = 0.5  # of Gaussian data


# --- levels and loss -------------------------------------------------------------------------------


def formula(t: float, stage: int) -> float:
    """r of arXiv:2406.14548, section 3.3, written out."""
    n = 1 + 8 / (1 + math.exp(t))
    return max(0.0, t * (1 - n / 2**stage))


@pytest.mark.parametrize("stage", [1, 3, 8])
def test_r_is_the_papers(stage):
    path = edm(200)
    found = consistency_coefficients(path, "edm", torch.arange(200), stage).double()
    ratios = (path.sigma / path.alpha).tolist()
    r = [formula(t, stage) for t in ratios]
    r = [value if value >= ratios[0] else 0.0 for value in r]
    assert_close(found[6], torch.tensor([ratios, r], dtype=torch.float64), rtol=1e-6, atol=1e-9)
    assert (found[6, 0] > found[6, 1]).all() and 0 < (found[6, 1] == 0).sum() < 200


@pytest.mark.parametrize("name, objective, zero_snr", [
    ("vp", "v", False), ("vp", "v", True), ("vp", "eps", False), ("edm", "edm", False), ("flow", "flow", False),
])  # fmt: skip
def test_x_and_f_are_of_their_levels(name, objective, zero_snr):
    """An ideal network of one image: f is x0 at t and at r, and the loss is 0."""
    path = make_path(name, 50, objective, zero_snr=zero_snr)
    k = consistency_coefficients(path, objective, torch.arange(50), stage=4)
    assert k.isfinite().all()
    alpha, sigma, c_in, c_noise, c_x, c_out, level = k.double()
    known = level > 0
    assert_close(
        (sigma / alpha)[known & (level < 1e3)], level[known & (level < 1e3)], rtol=1e-5, atol=0
    )
    x0, eps = torch.full((50, 1, 2, 2), 0.3), torch.randn(50, 1, 2, 2)
    calls = iter([k[:, 1], k[:, 0]])

    def network(x, noise, cond):
        alpha, sigma, c_in, c_noise, c_x, c_out, _ = next(calls)[..., None, None, None]
        assert_close(x, c_in * (alpha * x0 + sigma * eps))
        assert_close(noise, c_noise.flatten())
        return (x0 - c_x * x / c_in) / c_out

    assert_close(consistency_loss(network, k, x0, eps), torch.zeros(50), rtol=0, atol=2e-2)


def test_without_noise_f_is_x_for_all_but_x0():
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    for objective in OBJECTIVES:
        path = make_path("edm", 50, objective)
        c_x, c_out = x0_coefficients(path, objective, one, zero)
        assert (c_x == 1 and c_out == 0) == (objective != "x0")


def test_where_r_is_zero_the_target_is_x0():
    k = consistency_coefficients(edm(50), "edm", torch.arange(10), stage=1)
    assert (k[6, 1] == 0).all()
    x0, eps = torch.randn(10, 1, 2, 2), torch.randn(10, 1, 2, 2)
    calls = iter([math.nan, 0.0])
    loss = consistency_loss(lambda x, *_: x * next(calls), k, x0, eps)
    alpha, sigma, _, _, c_x, _, level = k[:, 0, :, None, None, None]
    square = (c_x * (x0 + sigma * eps) - x0).square().sum((1, 2, 3))
    assert_close(loss, ((square + 0.06**2).sqrt() - 0.06) / level.flatten())


def ideal(path, objective: str, std, levels_of):
    """A network that is the consistency function of N(0, std^2): x / alpha * std / sqrt(std^2 + t^2)."""

    def network(x, noise, cond):
        t = levels_of(noise.double())
        alpha, sigma = path.at(t)
        c_in, _, c_x, c_out = Denoiser(None, path, objective).coefficients(t, alpha, sigma).T
        shrink = std / (std**2 + (sigma / alpha) ** 2).sqrt()
        x_t = x.double() / c_in.view(-1, 1, 1, 1)
        f = x_t * (shrink / alpha).view(-1, 1, 1, 1)
        return (f - c_x.view(-1, 1, 1, 1) * x_t) / c_out.view(-1, 1, 1, 1)

    return network


CASES = [("vp", "v", lambda path, c: c), ("edm", "edm", lambda path, c: path.t_of(-4 * c)),
         ("flow", "flow", lambda path, c: path.t_of(torch.logit(1 - c / 1000)))]  # fmt: skip


def gaussian(path, n: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    x0 = STD * torch.randn(n, 1, 16, 16, generator=g)
    return path.sample_t(n, g), x0, torch.randn(x0.shape, generator=g)


@pytest.mark.parametrize("name, objective, levels_of", CASES, ids=[case[0] for case in CASES])
def test_the_exact_function_of_gaussian_data_has_no_distance_in_the_end(name, objective, levels_of):
    path = spread(make_path(name, 1000, objective), "lognormal", 0.0, 1.0)
    network = ideal(path, objective, STD, lambda c: levels_of(path, c))
    t, x0, eps = gaussian(path, 64, 0)
    distances = []
    for stage in (6, 7, 8, 9):
        k = consistency_coefficients(path, objective, t, stage)
        distances.append((consistency_loss(network, k, x0, eps) * (k[6, 0] - k[6, 1])).mean())
    assert_close(distances[3], torch.zeros(()), rtol=0, atol=0.02)
    assert all(b < 0.6 * a for a, b in zip(distances, distances[1:]))


@pytest.mark.parametrize("name, objective, levels_of", CASES, ids=[case[0] for case in CASES])
def test_tuning_finds_the_function_of_gaussian_data(name, objective, levels_of):
    """One parameter, the deviation, from twice the true one."""
    path = spread(make_path(name, 1000, objective), "lognormal", -0.5, 1.0)
    log_std = nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.Adam([log_std], 0.05)
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 120)
        network = ideal(path, objective, log_std.exp(), lambda c: levels_of(path, c))
        t, x0, eps = gaussian(path, 32, step)
        k = consistency_coefficients(path, objective, t, 1 + step // 20)
        consistency_loss(network, k, x0, eps).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(log_std.exp().item(), STD, rtol=0.03, atol=0)


def test_the_target_has_no_gradient_the_same_dropout_and_float32():
    path = edm(50)
    k = consistency_coefficients(path, "edm", torch.arange(20, 50), stage=16)
    x0, eps = torch.randn(30, 1, 8, 8), torch.randn(30, 1, 8, 8)
    layer = nn.Conv2d(1, 1, 1)
    seen = []

    def network(x, noise, cond):
        out = layer(x)
        seen.append((out.dtype, out.requires_grad))
        return nn.functional.dropout(out, 0.5)

    torch.manual_seed(3)
    loss = consistency_loss(network, k, x0, eps)
    assert ((loss * (k[6, 0] - k[6, 1])) < 0.05).all()  # other masks make a distance of about 1
    after = torch.rand(4)
    torch.manual_seed(3)
    network(x0, None, None)
    assert torch.equal(after, torch.rand(4))
    with torch.autocast("cpu", torch.bfloat16):
        consistency_loss(network, k, x0, eps).sum().backward()
    assert seen[3:] == [(torch.float32, False), (torch.bfloat16, True)]
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("path", [make_path("vp", 50, "v"), make_path("vp", 1000, "v", schedule="linear"),
                                  make_path("edm", 50, "edm"), make_path("flow", 50, "flow")])  # fmt: skip
def test_lcm_noises_x0_anew_from_the_same_levels_on_every_path(path):
    """arXiv:2303.01469, algorithm 1; 0.4 times levels that are evenly spaced in a flow's time."""
    assert "lcm" in SAMPLERS and "lcm" in MAKERS
    table = make_table(path, "lcm", 4)
    alpha, sigma = table.levels.T
    u = 0.98 * torch.tensor([1, 0.75, 0.5, 0.25]).double()
    assert_close((sigma / alpha)[:-1], 0.4 * u / (1 - u), rtol=1e-6, atol=0)
    expected = torch.zeros(4, 7).double()
    expected[:, D0] = alpha[1:]
    expected[:, NOISE] = sigma[1:]
    assert_close(table.to_x, expected)


def test_the_stage_is_a_function_of_the_step(tiny):
    config = Config(**tiny | dict(condition="none", consistency=True, consistency_stages=4))
    path, t = make_path("vp", 20, "v"), torch.arange(20)
    for step in range(12):
        expected = consistency_coefficients(path, "v", t, 1 + 4 * step // 12)
        assert torch.equal(loss_coefficients(config, path, t, (step + 1) / 12), expected)


# --- runs ------------------------------------------------------------------------------------------


def tuned(options: dict, base, **more) -> dict:
    """The options of a run that tunes a model; those of the base's network are left out."""
    taken = ("data", "batch_size", "train_steps", "save_and_sample_every", "log_every", "num_samples",
             "cache_dir", "device", "save_folder")  # fmt: skip
    return (
        {name: options[name] for name in taken}
        | dict(consistency=True, load_path=str(base), lr_warmup_steps=2, consistency_stages=3)
        | more
    )


def test_a_tuned_model_is_an_ordinary_one(tiny, model, tmp_path):
    train(Config(**tuned(tiny, model)))
    state = checkpoint.read(tmp_path / "run" / "model.pt")
    base = Config.from_dict(checkpoint.read(model)["config"])
    config = Config.from_dict(state["config"])
    for name in (
        "unet_dim",
        "dim_mults",
        "time_steps",
        "path",
        "objective",
        "condition_dropout",
        "dropout",
    ):
        assert getattr(config, name) == getattr(base, name), name
    assert (config.sampler, config.sample_steps, config.noise_dist) == ("lcm", 2, "lognormal")
    pipeline = load(tmp_path / "run")
    table = pipeline.table()
    assert (table.sampler, len(table)) == ("lcm", 2)
    assert_close(
        (table.levels[1, 1] / table.levels[1, 0]).item(), 0.4 * 0.49 / 0.51, rtol=1e-6, atol=0
    )
    assert torch.equal(pipeline.table("lcm").levels, table.levels)
    assert (pipeline.table("ddim").sampler, len(pipeline.table(steps=4))) == ("ddim", 4)
    assert load(model).table().sampler != "lcm"
    images = pipeline.sample(range(2), labels=torch.tensor([0, 1]), guidance_scale=2.0)
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()


def test_resume_is_exact(tiny, model, tmp_path):
    options = tuned(tiny, model)
    train(Config(**options))
    shutil.copytree(tmp_path / "run", tmp_path / "straight")
    for name in ("checkpoints/step_00000012.pt", "checkpoints/step_00000008.pt", "model.pt"):
        (tmp_path / "run" / name).unlink()
    train(Config(**options))
    same_runs(tmp_path / "run", tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_ranks_and_accumulation_give_the_gradients_of_one(tiny, model, tmp_path, amp):
    base = tuned(tiny, model, train_steps=1, save_and_sample_every=1, dropout=0.0, amp=amp)
    found = []
    for ranks, accum in [(1, 1), (2, 1), (2, 2)]:
        folder = str(tmp_path / f"run_{ranks}_{accum}")
        found.append(
            one_step_gradients(tmp_path, base | dict(grad_accum=accum, save_folder=folder), ranks)
        )
    for other in found[1:]:
        for a, b in zip(found[0], other):
            rough = dict(rtol=0.1, atol=0.1 * a.abs().max().item())
            assert_close(a, b, **(dict(rtol=1e-4, atol=1e-5) if amp == "no" else rough))
    assert max(g.abs().max() for g in found[0]) > 1e-3


@pytest.mark.slow
def test_latents_with_text_are_tuned(scratch, faces, tmp_path):
    train(Config(
        mode="latent", data=str(faces), load_path=str(scratch), consistency=True, batch_size=4, train_steps=4,
        save_and_sample_every=4, num_samples=2, cache_dir=str(tmp_path / "cache"), device="cpu",
        save_folder=str(tmp_path / "run"),
    ))  # fmt: skip
    pipeline = load(tmp_path / "run")
    images = pipeline.sample(range(2), **pipeline.prompted(["a face"])(range(2)))
    assert images.isfinite().all()


@pytest.mark.slow
def test_a_lora_is_tuned(tiny, model, tmp_path):
    train(Config(**tuned(tiny, model, adapter="lora", rank=2)))
    assert (tmp_path / "run" / "adapter.safetensors").exists()


@pytest.mark.parametrize("change, names", [
    (dict(load_path=None), ["--load_path", "--consistency"]),
    (dict(loss="huber"), ["--loss", "--consistency"]),
    (dict(min_snr_gamma=5.0), ["--min_snr_gamma"]),
    (dict(objective="x0"), ["objective"]),
    (dict(time_steps=30), ["--time_steps"]),
    (dict(mode="vae"), ["--mode"]),
])  # fmt: skip
def test_what_cannot_be_tuned_is_refused(tiny, model, change, names):
    with pytest.raises(UserError) as error:
        train(Config(**tuned(tiny, model) | change))
    assert all(name in str(error.value) for name in names)


def test_an_x0_model_is_refused(tiny, tmp_path):
    train(
        Config(
            **tiny
            | dict(objective="x0", train_steps=2, num_samples=0, save_folder=str(tmp_path / "x0"))
        )
    )
    with pytest.raises(UserError, match="objective eps, v"):
        train(Config(**tuned(tiny, tmp_path / "x0" / "model.pt")))


def test_stages_need_the_tuning(tiny):
    with pytest.raises(UserError, match="--consistency_stages"):
        train(Config(**tiny | dict(consistency_stages=5)))
