"""Sampler tables against textbook formulas, orders of convergence, and diffusers."""

import dataclasses
import math
from functools import partial

import mixture
import pytest
import torch
from torch.testing import assert_close

from diffusion.config import Config
from diffusion.models.build import for_inference
from diffusion.models.cond import Cond
from diffusion.models.unet import UNet
from diffusion.process import names, samplers, schedule
from diffusion.process.loop import Inpaint, guided, sample, sample_loop
from diffusion.process.objective import Denoiser
from diffusion.process.samplers import D0, NOISE, Table, make_table
from diffusion.process.schedule import make_path, make_schedule
from diffusion.sampling.pipeline import Pipeline


def toy_x0(x, alpha, sigma, mean=0.3, std=0.5):
    """E[x0 | x_t] where the data are N(mean, std^2): the ideal denoiser, nonlinear in t."""
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return mean + gain * (x - alpha * mean)


run = partial(mixture.run, denoiser=toy_x0)


@pytest.fixture
def x():
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def draws(n, like):
    g = torch.Generator().manual_seed(7)
    return [torch.randn(like.shape, generator=g, dtype=like.dtype) for _ in range(n)]


def test_ddpm_is_algorithm_2(x):
    """Over all T steps the table is DDPM's sampling, eq. 7 in its betas."""
    s = make_schedule("linear", 60)
    bar = s.alpha_bar
    noise = draws(60, x)
    states = run(make_table(s, "ddpm", 60), x, noise=noise)
    for i, t in enumerate(reversed(range(60))):
        before = bar[t - 1] if t else torch.ones(()).double()
        beta = 1 - bar[t] / before
        x0 = toy_x0(x, bar[t].sqrt(), (1 - bar[t]).sqrt())
        mean = before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x
        variance = (1 - before) / (1 - bar[t]) * beta
        x = mean / (1 - bar[t]) + variance.sqrt() * noise[i]
        assert_close(states[i + 1], x, rtol=1e-11, atol=1e-11)


def test_ddpm_large_has_variance_beta():
    s = make_schedule("linear", 60)
    small, large = (make_table(s, name, 60).to_x for name in ("ddpm", "ddpm_large"))
    assert_close(small[:, :NOISE], large[:, :NOISE], rtol=0, atol=0)
    beta = (1 - s.alpha_bar[1:] / s.alpha_bar[:-1]).flip(0)  # DDPM eq. 4
    assert_close(large[:-1, NOISE] ** 2, beta, rtol=1e-10, atol=1e-12)
    assert large[-1, NOISE] == 0 and (large[:-1, NOISE] > small[:-1, NOISE]).all()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_formula(x, eta):
    """DDIM eq. 12, written out with alpha_bar."""
    s = make_schedule("cosine", 100)
    table, noise = make_table(s, "ddim", 20, eta=eta), draws(20, x)
    states = run(table, x, noise=noise)
    bar = torch.cat([s.alpha_bar[table.t.long()], torch.ones(1, dtype=torch.float64)])
    for i in range(20):
        a_t, a_s = bar[i], bar[i + 1]
        x0 = toy_x0(x, a_t.sqrt(), (1 - a_t).sqrt())
        eps = (x - a_t.sqrt() * x0) / (1 - a_t).sqrt()
        std = eta * ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)).sqrt()
        x = a_s.sqrt() * x0 + (1 - a_s - std**2).clamp(min=0).sqrt() * eps + std * noise[i]
        assert_close(states[i + 1], x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name, eta", [("dpmpp_2m", 0), ("dpmpp_2m_sde", 1)])
def test_dpmpp_formula(x, name, eta):
    """DPM-Solver++(2M) in the noise levels sigma / alpha, as Karras-style samplers write it."""
    s = make_schedule("linear", 1000)
    table, noise = make_table(s, name, 12), draws(12, x)
    states = run(table, x, noise=noise)
    level = [float(b / a) for a, b in table.levels]
    y, old = x / table.levels[0, 0], None
    for i in range(12):
        x0 = toy_x0(y * table.levels[i, 0], *table.levels[i])
        if level[i + 1] == 0:
            y = x0
        else:
            h = -math.log(level[i + 1] / level[i])
            d = x0
            if old is not None:
                r = -math.log(level[i] / level[i - 1]) / h
                d = x0 + (x0 - old) / (2 * r)
            y = level[i + 1] / level[i] * math.exp(-eta * h) * y - math.expm1(-(1 + eta) * h) * d
            y = y + level[i + 1] * math.sqrt(-math.expm1(-2 * eta * h)) * noise[i]
        old = x0
        assert_close(states[i + 1], y * table.levels[i + 1, 0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name, order", [("ddim", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(x, name, order):
    """Halving log-SNR-uniform steps divides the error by 2^order; the exact flow is known here."""
    s = make_schedule("linear", 1000)
    exact_std = lambda a, b: (a**2 * 0.25 + b**2).sqrt()
    errors = []
    for steps in (40, 80, 160, 320):
        table = make_table(s, name, steps, spacing="logsnr", final="alpha_bar_0")
        (a, b), (c, d) = table.levels[0], table.levels[-1]
        exact = c * 0.3 + exact_std(c, d) / exact_std(a, b) * (x - a * 0.3)
        errors.append(float((run(table, x)[-1] - exact).abs().max()))
    measured = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert measured[-1] == pytest.approx(order, abs=0.1), measured


def test_stochastic_samplers_reach_the_data():
    """Mean and variance of the ideal denoiser's samples are the data's."""
    g = torch.Generator().manual_seed(3)
    for name in ("ddpm", "ddpm_large", "dpmpp_2m_sde", "dpmpp_3m_sde"):
        table = make_table(make_schedule("linear", 1000), name, 200)
        x = torch.randn(20_000, 1, 1, 1, generator=g, dtype=torch.float64)
        noise = [torch.randn(x.shape, generator=g, dtype=x.dtype) for _ in range(200)]
        end = run(table, x, noise=noise)[-1]
        assert_close(end.mean().item(), 0.3, rtol=0, atol=0.015)
        assert_close(end.std().item(), 0.5, rtol=0.04, atol=0)


def rows(table: Table) -> torch.Tensor:
    return torch.cat([table.to_x, table.to_y, table.keep], 1)


ENDLESS = dict(  # paths whose last alpha is 0, and one whose is not
    vp=lambda: make_schedule("cosine", 50),
    zero_snr=lambda: make_schedule("cosine", 50, zero_snr=True),
    flow=lambda: make_path("flow", 50, "v"),
    edm=lambda: make_path("edm", 50, "edm"),
)


@pytest.mark.parametrize("name", names.SAMPLERS)
@pytest.mark.parametrize("spacing", names.SPACINGS)
@pytest.mark.parametrize("path", ENDLESS)
def test_tables_are_finite_and_exact_in_number(name, spacing, path):
    """N evaluations for N steps, even or odd, also beyond T, from any end; the last adds none."""
    path = ENDLESS[path]()
    for steps in (1, 2, 3, 13, 30, 121):
        table = make_table(path, name, steps, spacing=spacing)
        assert len(table) == steps and rows(table).isfinite().all()
        assert table.levels[-1].tolist() == [1, 0] and table.levels.isfinite().all()
        assert table.to_y[-1, NOISE] == 0


def test_every_name_has_its_function():
    """The names are in a file that imports no torch."""
    assert names.SAMPLERS.keys() == samplers.MAKERS.keys()
    assert names.SPACINGS == tuple(schedule.SPACINGS)
    assert set(names.ALIASES.values()) <= names.SAMPLERS.keys()


# --- diffusers ------------------------------------------------------------------------------------


def diffusers_run(scheduler, steps, x, objective, noise):
    scheduler.set_timesteps(steps)
    bar = scheduler.alphas_cumprod.double()
    states = [x]
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = bar[t].sqrt(), (1 - bar[t]).sqrt()
        x0 = toy_x0(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        out = {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0}[objective]
        x = scheduler.step(out, t, x, **noise(i)).prev_sample
        states.append(x)
    return states


BETAS = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)
PREDICTS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


@pytest.mark.parametrize("objective", PREDICTS)
@pytest.mark.parametrize("spacing, steps, offset", [
    ("leading", 50, 1), ("leading", 7, 0), ("trailing", 50, 0), ("trailing", 8, 0),
])  # fmt: skip
@pytest.mark.parametrize("final", ["zero", "alpha_bar_0"])
def test_ddim_is_diffusers(x, objective, spacing, steps, offset, final):
    d = pytest.importorskip("diffusers", reason="oracle not installed: tests/requirements.txt")
    theirs = d.DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=final == "zero", steps_offset=offset,
        timestep_spacing=spacing, prediction_type=PREDICTS[objective])  # fmt: skip
    table = make_table(make_schedule("scaled_linear", 1000), "ddim", steps, spacing=spacing,
                       offset=offset, final=final)  # fmt: skip
    theirs.set_timesteps(steps)
    assert table.t.tolist() == theirs.timesteps.tolist()
    # its alphas are a float32 cumulative product: 1e-5 at best
    for a, b in zip(run(table, x), diffusers_run(theirs, steps, x, objective, lambda i: {})):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, algorithm", [("dpmpp_2m", "dpmsolver++"), ("dpmpp_2m_sde", "sde-dpmsolver++")]
)
@pytest.mark.parametrize(
    "spacing, steps", [("leading", 20), ("trailing", 20), ("linspace", 20), ("trailing", 8)]
)
def test_dpmpp_is_diffusers(x, name, algorithm, spacing, steps):
    d = pytest.importorskip("diffusers", reason="oracle not installed: tests/requirements.txt")
    theirs = d.DPMSolverMultistepScheduler(
        **BETAS, algorithm_type=algorithm, solver_order=2, timestep_spacing=spacing,
        final_sigmas_type="zero", euler_at_final=True, prediction_type="epsilon")  # fmt: skip
    table = make_table(make_schedule("scaled_linear", 1000), name, steps, spacing=spacing)
    theirs.set_timesteps(steps)
    assert table.t.tolist() == theirs.timesteps.tolist()
    noise = draws(steps, x)
    give = (lambda i: {"variance_noise": noise[i]}) if "sde" in name else (lambda i: {})
    for a, b in zip(run(table, x, noise=noise), diffusers_run(theirs, steps, x, "eps", give)):
        assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name, kind", [
    ("dpmpp_2m", "DPMSolverMultistepScheduler"), ("ddim", "EulerDiscreteScheduler"),
])  # fmt: skip
def test_karras_is_diffusers(x, name, kind):
    """Its levels are exact, whole timesteps or not; Euler's x is x / alpha."""
    d = pytest.importorskip("diffusers", reason="oracle not installed: tests/requirements.txt")
    more = {"euler_at_final": True} if name == "dpmpp_2m" else {}
    theirs = getattr(d, kind)(**BETAS, use_karras_sigmas=True, **more)
    theirs.set_timesteps(12)
    table = make_table(make_schedule("scaled_linear", 1000), name, 12, spacing="karras")
    assert_close(table.t, theirs.timesteps.double(), rtol=0, atol=0.01)
    ratio = table.levels[:, 1] / table.levels[:, 0]
    assert_close(ratio, theirs.sigmas.double(), rtol=1e-4, atol=1e-6)
    states = [x]
    y = x if name == "dpmpp_2m" else x / float(table.levels[0, 0])
    for t, (alpha, sigma), (end, _) in zip(theirs.timesteps, table.levels, table.levels[1:]):
        own = y if name == "dpmpp_2m" else alpha * y
        eps = (own - alpha * toy_x0(own, alpha, sigma)) / sigma
        if name == "ddim":
            theirs.is_scale_input_called = True
        y = theirs.step(eps, t, y).prev_sample
        states.append(y if name == "dpmpp_2m" else end * y)
    for a, b in zip(run(table, x), states):
        assert_close(a, b, rtol=2e-4, atol=2e-4, check_dtype=False)


def test_ddpm_is_diffusers(x, monkeypatch):
    d = pytest.importorskip("diffusers", reason="oracle not installed: tests/requirements.txt")
    theirs = d.DDPMScheduler(
        **BETAS, variance_type="fixed_small", clip_sample=False, timestep_spacing="trailing"
    )
    noise = draws(50, x)
    queue = iter(noise)
    import diffusers.schedulers.scheduling_ddpm as module

    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: next(queue))
    table = make_table(make_schedule("scaled_linear", 1000), "ddpm", 50)
    for a, b in zip(run(table, x, noise=noise), diffusers_run(theirs, 50, x, "eps", lambda i: {})):
        assert_close(a, b, rtol=1e-3, atol=1e-3)


# --- the loop ---------------------------------------------------------------------------------


def denoiser(schedule, objective) -> Denoiser:
    """The toy denoiser by a float32 network that puts out `objective`."""

    def network(x, t):
        alpha, sigma = (v.float().view(-1, 1, 1, 1) for v in schedule.at(t.double()))
        x0 = toy_x0(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        targets = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}
        return targets[objective]

    return Denoiser(network, schedule, objective)


@pytest.mark.parametrize("objective", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("name", names.SAMPLERS)
def test_loop_runs_the_table(x, name, objective):
    s = make_schedule("linear", 100)
    table, noise = make_table(s, name, 25), draws(25, x)
    queue = iter(noise)
    noise_of_row = lambda: next(queue).float()
    got = sample(denoiser(s, objective), x.float(), table, clip=False, noise=noise_of_row)
    assert_close(got, run(table, x, noise=noise)[-1].float(), rtol=1e-4, atol=1e-4)


def test_loop_keeps_what_the_table_says(x):
    """Two states with eps in the history, which no sampler has."""
    s = make_schedule("linear", 100)
    table = make_table(s, "unipc3", 10)
    table = dataclasses.replace(table, keep=samplers.eps_of(table.levels[:-1]))
    got = sample(denoiser(s, "v"), x.float(), table, clip=False)
    assert_close(got, run(table, x)[-1].float(), rtol=1e-3, atol=1e-3)


def test_clipping_rederives_the_noise(x):
    """With a clipped x0, x_t stays alpha_t x0 + sigma_t eps (use_clipped_model_output)."""
    s = make_schedule("linear", 100)
    table = make_table(s, "ddim", 10)
    far = Denoiser(lambda x, t: torch.full_like(x, 3.0), s, "x0")
    (x1, x0), *_ = sample_loop(far, x.float(), table)
    assert x0.max() == 1
    (a, b), (c, d) = table.levels[:2].float()
    assert_close(x1, c * 1 + d * (x.float() - a) / b)


def test_missing_noise_and_impossible_objective_are_refused(x):
    s = make_schedule("linear", 100, zero_snr=True)
    v, eps = (Denoiser(lambda x, t: x, s, objective) for objective in ("v", "eps"))
    with pytest.raises(ValueError, match="noise="):
        sample(v, x.float(), make_table(s, "ddpm", 10))
    with pytest.raises(ValueError, match="eps.*needs v, x0 or flow"):
        sample(eps, x.float(), make_table(s, "ddim", 10))
    with pytest.raises(ValueError, match="ddpm, ddpm_large"):
        make_table(s, "eulre", 10)
    with pytest.raises(ValueError, match="eta"):
        make_table(s, "ddim", 10, eta=1.5)
    with pytest.raises(ValueError, match="churn.*heun"):
        make_table(s, "ddim", 10, churn=1.0)


def test_guidance_scale_one_is_conditional(x):
    x = x.float()
    calls = []

    def model(x, t, cond):
        calls.append(len(x))
        return x * cond.view(-1, 1, 1, 1)

    cond, uncond, t = torch.full((4,), 2.0), torch.full((4,), 0.5), torch.zeros(4)
    assert_close(guided(model)(x, t, 1.0, cond, uncond), 2 * x)
    assert_close(guided(model)(x, t, 0.0, cond, uncond), 0.5 * x)
    assert_close(guided(model)(x, t, 3.0, cond, uncond), (0.5 + 3 * 1.5) * x)
    assert_close(guided(model, batched=False)(x, t, 3.0, cond, uncond), (0.5 + 3 * 1.5) * x)
    assert calls == [8, 8, 8, 4, 4]
    rescaled = guided(model, rescale=1.0)(x, t, 3.0, cond, uncond)
    assert_close(rescaled.std((1, 2, 3)), (2 * x).std((1, 2, 3)))
    worse = guided(model, guide=lambda x, t, cond: 0.1 * x)
    assert_close(worse(x, t, 3.0, cond, cond), (0.1 + 3 * 1.9) * x)


def test_image_to_image_starts_later(x):
    s = make_schedule("linear", 1000)
    complete, late = make_table(s, "dpmpp_2m", 20), make_table(s, "dpmpp_2m", 20, strength=0.5)
    assert len(late) == 10 and late.t.tolist() == complete.t[10:].tolist()
    assert (late.to_x[0, D0 + 1 :] == 0).all(), "no x0 stands before the first row that is run"
    assert_close(late.to_x[1:], complete.to_x[11:], rtol=0, atol=0)
    with pytest.raises(ValueError, match="strength"):
        make_table(s, "ddim", 20, strength=0.01)


def test_inpainting_keeps_what_the_mask_keeps(x):
    s = make_schedule("linear", 100)
    known, noise = draws(2, x.float())
    known = known.clamp(-1, 1)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    inpaint = Inpaint(known, mask, noise)
    seen = []
    table = make_table(s, "ddim", 10)
    for state, _ in sample_loop(denoiser(s, "v"), x.float(), table, inpaint=inpaint):
        seen.append(state)
    assert_close(seen[-1][..., 2:], known[..., 2:])
    assert not torch.allclose(seen[-1][..., :2], known[..., :2], atol=0.1)
    a, b = table.levels[5].float()
    assert_close(seen[4][..., 2:], (a * known + b * noise)[..., 2:])


@pytest.mark.parametrize("name", ["heun", "dpm2", "unipc3"])
def test_inpainting_blends_each_state_at_its_own_level(x, name):
    """The x that waits stands where the evaluation before was made, y where the next one is."""
    s = make_schedule("linear", 100)
    known, noise = draws(2, x.float())
    kept = torch.zeros(1, 1, 4, 4)
    table = make_table(s, name, 9)
    level = [a * known + b * noise for a, b in table.levels.float()]
    seen = []

    def spy(run, what):
        return lambda k, x, y, *rest: seen.append((x, y)) or run(k, x, y, *rest)

    inpaint = Inpaint(known, kept, noise)
    sample(denoiser(s, "v"), x.float(), table, inpaint=inpaint, capture=spy)
    for i in range(1, 9):
        second = name == "unipc3" or i % 2 == 1 and i < 8
        assert_close(seen[i][0], level[i - 1 if second else i])
        assert_close(seen[i][1], level[i])


@pytest.mark.parametrize("name", ["heun", "dpm2"])
@pytest.mark.parametrize("steps", [9, 10])
def test_two_stages_start_later_at_a_step(name, steps):
    s = make_schedule("linear", 1000)
    complete, late = (
        make_table(s, name, steps, strength=strength, spacing="trailing") for strength in (1.0, 0.5)
    )
    start = make_table(s, "ddim", steps // 2 + 1, strength=0.5).levels[0]
    assert_close(late.levels[0], start, rtol=0, atol=0)
    assert 0 < len(late) < steps
    for ours, theirs in ((late.to_x, complete.to_x), (late.to_y, complete.to_y)):
        assert_close(ours, theirs[-len(late) :], rtol=0, atol=0)


@pytest.mark.parametrize("name", names.SAMPLERS)
def test_the_network_is_called_once_a_step(x, name):
    s = make_schedule("linear", 100)
    calls = []
    network = lambda x, t: calls.append(len(x)) or 0 * x
    for steps in (1, 2, 9, 10):
        calls.clear()
        denoise = Denoiser(network, s, "v")
        sample(denoise, x.float(), make_table(s, name, steps), noise=lambda: 0 * x.float())
        assert calls == [4] * steps


@pytest.mark.parametrize("name", [n for n, info in names.SAMPLERS.items() if info.eta] + ["heun"])
@pytest.mark.parametrize("path", ["vp", "flow", "edm"])
def test_image_i_does_not_depend_on_its_neighbours(name, path):
    """Nor does the noise that its rows add."""
    torch.manual_seed(0)
    unet = UNet(8, (1, 2), heads=2)
    torch.nn.init.normal_(unet.out.weight, std=0.1)
    config = Config(image_size=8, path=path, objective="v")
    pipeline = Pipeline(config, unet, make_path(path, 50, "v"))
    options = dict(sampler=name, steps=5, amp="no", churn=2.0 * (name == "heun"))
    together = pipeline.sample(range(4), **options)
    assert_close(pipeline.sample([2], **options), together[2:3], rtol=0, atol=1e-4)
    assert not torch.allclose(pipeline.sample([2], seed=1, **options), together[2:3], atol=0.1)


@pytest.mark.slow
def test_step_reads_nothing_and_compiles_whole(x):
    """Ready for CUDA graphs: no value goes to the host, and the step is one graph."""
    import torch._dynamo  # reads values while it is imported, in torch 2.6
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "local_scalar_dense" not in str(func) and "nonzero" not in str(func), func
            return func(*args, **(kwargs or {}))

    unet = UNet(8, (1, 2), heads=2, num_classes=1).eval()
    torch.nn.init.normal_(unet.out.weight)
    s = make_schedule("linear", 100)
    table = make_table(s, "ddim", 10)
    zeros = torch.zeros(4, 3, 4, 4)
    labels = (torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long))
    seen = []

    def capture(run, what):
        return lambda *tensors: seen.append((run, tensors)) or run(*tensors)

    for name in ("ddim", "unipc3", "dpmpp_3m_sde"):
        table = make_table(s, name, 10).guided(3.0)
        for ready, rescale in ((unet, 0.7), (for_inference(unet), 0.0)):
            network = lambda x, t, label, ready=ready: ready(x, t, Cond(labels=label))
            both = Denoiser(guided(network, rescale=rescale), s, "v", weighted=True)
            one = Denoiser(network, s, "v")
            given = dict(cond=labels[:1], uncond=labels[1:], noise=lambda: zeros, guided=both)
            sample(one, x.float(), table, capture=capture, **given)
            run, tensors = seen[-7]
            with torch.inference_mode(), NoReads():
                eager = run(*tensors)
            torch._dynamo.reset()
            compiled = torch.compile(run.__call__, fullgraph=True, backend="eager")
            with torch.inference_mode():
                assert_close(compiled(*tensors), eager)
