"""Schedules, forward process, posterior and loss against closed forms."""

import math

import pytest
import torch
from torch.testing import assert_close

from diffusion.process import objective as gaussian
from diffusion.process import schedule
from diffusion.process.schedule import SCHEDULES, make_schedule, timesteps

EXACT = dict(rtol=1e-10, atol=1e-10)


def test_linear_is_ddpm():
    s = make_schedule("linear", 1000)
    beta = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    bar = math.exp(math.fsum(math.log1p(-b) for b in beta))
    assert_close(s.beta, torch.tensor(beta, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert_close(s.alpha_bar[-1].item(), bar, rtol=1e-10, atol=0)
    assert_close(bar, 4.04e-5, rtol=1e-2, atol=0)


def test_scaled_linear_is_stable_diffusion():
    s = make_schedule("scaled_linear", 1000)
    sigma = s.sigma / s.alpha
    assert_close(
        s.alpha_bar[[0, -1]], torch.tensor([0.99915, 0.0046601]).double(), rtol=1e-5, atol=0
    )
    assert_close(sigma[[0, -1]], torch.tensor([0.029167, 14.6146]).double(), rtol=1e-4, atol=0)


def test_cosine_closed_form():
    """Nichol & Dhariwal eq. 17, before the cap on beta acts."""
    T = 200
    s = make_schedule("cosine", T)
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    expected = torch.tensor([v / f[0] for v in f[1:]], dtype=torch.float64)
    assert_close(s.alpha_bar[:-1], expected[:-1], **EXACT)
    assert s.beta[-1] <= 0.999


def test_sigmoid_closed_form():
    T = 100
    s = make_schedule("sigmoid", T)
    g = lambda u: 1 / (1 + math.exp(-(u * 6 - 3)))
    expected = [(g(1) - g(u / T)) / (g(1) - g(0)) for u in range(1, T)]
    assert_close(s.alpha_bar[:-1], torch.tensor(expected, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("T", [2, 5, 50, 1000])
def test_schedules_fall_and_stay_inside(name, T):
    s = make_schedule(name, T)
    assert s.alpha_bar.dtype == torch.float64 and len(s) == T
    assert (s.alpha_bar.diff() < 0).all() and 0 < s.alpha_bar[-1] and s.alpha_bar[0] < 1
    assert (s.beta <= schedule.MAX_BETA + 1e-12).all()


def test_zero_terminal_snr():
    plain, zero = make_schedule("linear", 1000), make_schedule("linear", 1000, zero_snr=True)
    assert zero.alpha_bar[-1] == 0 and torch.isinf(zero.lam[-1])
    assert_close(zero.alpha_bar[0], plain.alpha_bar[0], **EXACT)
    assert (zero.alpha_bar.diff() < 0).all()


def test_unknown_schedule_names_the_choices():
    with pytest.raises(ValueError, match="cosine, linear"):
        make_schedule("cosin", 10)
    with pytest.raises(ValueError, match="at least 2"):
        make_schedule("cosine", 1)


def test_real_valued_t():
    s = make_schedule("cosine", 100, zero_snr=True)
    t = torch.tensor([0.0, 3.0, 99.0, 42.25], dtype=torch.float64)
    alpha, sigma = s.at(t)
    assert_close(alpha[:3], s.alpha[[0, 3, 99]], rtol=0, atol=0)
    assert_close(alpha**2 + sigma**2, torch.ones(4, dtype=torch.float64), **EXACT)
    lam = (alpha / sigma).log()
    assert_close(lam[3], 0.75 * s.lam[42] + 0.25 * s.lam[43], **EXACT)
    assert_close(s.t_of(lam[[1, 3]]), t[[1, 3]], **EXACT)


# --- spacing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, spacing, offset, expected", [
    (5, "leading", 1, [801, 601, 401, 201, 1]),       # diffusers' test_scheduler_ddim
    (5, "trailing", 0, [999, 799, 599, 399, 199]),
    (5, "linspace", 0, [999, 749, 500, 250, 0]),
    (30, "trailing", 0, [999, 966, 932, 899]),        # 1000 / 30 does not divide
])  # fmt: skip
def test_spacing(steps, spacing, offset, expected):
    t = timesteps(make_schedule("linear", 1000), steps, spacing, offset)
    assert t[: len(expected)].tolist() == expected and len(t) == steps


@pytest.mark.parametrize("spacing", schedule.SPACINGS)
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7, 13, 30, 50])
def test_steps_are_exact_distinct_and_inside(spacing, zero_snr, steps):
    t = timesteps(make_schedule("cosine", 50, zero_snr), steps, spacing)
    assert len(t) == steps and (t.diff() < 0).all() and t[0] <= 49 and t[-1] >= 0
    if spacing in ("trailing", "logsnr"):
        assert t[0] == 49


def test_logsnr_is_uniform():
    s = make_schedule("linear", 1000)
    alpha, sigma = s.at(timesteps(s, 20, "logsnr"))
    h = (alpha / sigma).log().diff()
    assert_close(h, h.mean().expand(19), rtol=1e-9, atol=1e-9)


def test_impossible_spacings_are_refused():
    s = make_schedule("linear", 100)
    with pytest.raises(ValueError, match="at most 100"):
        timesteps(s, 101, "trailing")
    with pytest.raises(ValueError, match="offset"):
        timesteps(s, 100, "leading", offset=1)
    with pytest.raises(ValueError, match="leading, trailing"):
        timesteps(s, 10, "karras")
    assert len(timesteps(s, 150, "logsnr")) == 150


# --- the forward process -----------------------------------------------------------------------


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(6, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return make_schedule("linear", 100), x0, eps, torch.tensor([0, 1, 17, 50, 98, 99])


def test_q_sample_and_back(case):
    s, x0, eps, t = case
    x_t = gaussian.q_sample(s, x0, t, eps)
    bar = s.alpha_bar[t].view(-1, 1, 1, 1)
    assert_close(x_t, bar.sqrt() * x0 + (1 - bar).sqrt() * eps, **EXACT)
    for objective in gaussian.OBJECTIVES:
        out = gaussian.target(s, objective, x0, t, eps)
        assert_close(gaussian.predict_x0(s, objective, out, x_t, t), x0, **EXACT)
    assert_close(gaussian.predict_eps(s, x0, x_t, t), eps, **EXACT)


def test_forward_moments():
    """x_t of unit-variance data has unit variance at every t."""
    s = make_schedule("cosine", 10)
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(10, 1, 200, 200, generator=g) for _ in range(2))
    std = gaussian.q_sample(s, x0, torch.arange(10), eps).std((1, 2, 3))
    assert_close(std, torch.ones(10), rtol=0.02, atol=0)


def test_posterior_is_bayes(case):
    """q(x_{t-1} | x_t, x0) from the product of the two Gaussians that it is made of."""
    s, x0, eps, t = case
    t = t.clamp(min=1)
    x_t = gaussian.q_sample(s, x0, t, eps)
    mean, variance = gaussian.posterior(s, x0, x_t, t)
    v = lambda table: table[t].view(-1, 1, 1, 1)
    beta, prev = v(s.beta), v(s.alpha_bar_prev)
    precision = (1 - beta) / beta + 1 / (1 - prev)  # likelihood and prior of x_{t-1}
    expected = ((1 - beta).sqrt() / beta * x_t + prev.sqrt() / (1 - prev) * x0) / precision
    assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    assert_close(variance, 1 / precision, rtol=1e-9, atol=1e-12)


def test_last_p_sample_adds_no_noise(case):
    s, x0, eps, _ = case
    t = torch.zeros(6, dtype=torch.long)
    a, b = (gaussian.p_sample(s, x0, eps, t, noise) for noise in (eps, 5 * eps))
    assert_close(a, b, rtol=0, atol=0)
    assert_close(a, x0, **EXACT)


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", gaussian.LOSSES)
@pytest.mark.parametrize("objective", gaussian.OBJECTIVES)
def test_loss_of_a_perfect_network_is_zero(case, objective, loss):
    s, x0, eps, t = case
    x0, eps = x0.float(), eps.float()
    perfect = lambda x, t_, cond: gaussian.target(s, objective, x0, t, eps)
    value = gaussian.training_loss(perfect, s, objective, x0, t, eps, loss=loss, min_snr_gamma=5)
    assert value.shape == (6,) and value.abs().max() < 1e-6
    off = lambda x, t_, cond: perfect(x, t_, cond) + 0.5
    expected = {"l1": 0.5, "l2": 0.25, "huber": 0.125}[loss]
    value = gaussian.training_loss(off, s, objective, x0, t, eps, loss=loss)
    assert_close(value, torch.full((6,), expected), rtol=1e-4, atol=1e-5)


def test_min_snr_weights():
    """The same loss in terms of x0, whichever the objective (arXiv:2303.09556, section 3.4)."""
    snr = torch.tensor([1e-4, 0.5, 5.0, 80.0], dtype=torch.float64)
    w = {o: gaussian.min_snr_weight(o, snr, 5.0) for o in gaussian.OBJECTIVES}
    assert_close(w["eps"] * snr, snr.clamp(max=5), **EXACT)
    assert_close(w["v"] * (snr + 1), snr.clamp(max=5), **EXACT)
    zero = torch.zeros(1, dtype=torch.float64)
    assert [gaussian.min_snr_weight(o, zero, 5.0).item() for o in ("eps", "v")] == [1, 0]


def test_min_snr_weight_in_the_loss(case):
    s, x0, eps, t = case
    x0, eps = x0.float(), eps.float()
    zeros = lambda x, t_, cond: torch.zeros_like(x)
    plain = gaussian.training_loss(zeros, s, "v", x0, t, eps)
    weighted = gaussian.training_loss(zeros, s, "v", x0, t, eps, min_snr_gamma=5)
    snr = s.snr[t].float()
    assert_close(weighted, plain * snr.clamp(max=5) / (snr + 1))


def test_unknown_names_are_refused(case):
    s, x0, eps, t = case
    with pytest.raises(ValueError, match="l1, l2, huber"):
        gaussian.training_loss(None, s, "v", x0, t, eps, loss="l3")
    with pytest.raises(ValueError, match="eps, x0, v"):
        gaussian.target(s, "score", x0, t, eps)


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_schedules_and_posterior_are_lucidrains(name):
    """denoising-diffusion-pytorch, whose buffers are float32."""
    peer = pytest.importorskip(
        "denoising_diffusion_pytorch", reason="oracle not installed: tests/requirements.txt"
    )
    theirs = peer.GaussianDiffusion(
        peer.Unet(8, dim_mults=(1,)),
        image_size=8,
        timesteps=100,
        beta_schedule=name,
        auto_normalize=False,
    )
    s = make_schedule(name, 100)
    assert_close(s.alpha_bar.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(4, 3, 8, 8, generator=g) for _ in range(2))
    t = torch.tensor([1, 20, 60, 98])
    x_t = gaussian.q_sample(s, x0, t, eps)
    assert_close(x_t, theirs.q_sample(x0, t, eps), rtol=1e-4, atol=1e-5)
    mean, variance = gaussian.posterior(s, x0, x_t, t)
    their_mean, their_variance, _ = theirs.q_posterior(x0, x_t, t)
    assert_close(mean, their_mean, rtol=1e-3, atol=1e-4)
    assert_close(variance, their_variance, rtol=1e-3, atol=1e-7)
    assert_close(
        gaussian.target(s, "v", x0, t, eps), theirs.predict_v(x0, t, eps), rtol=1e-4, atol=1e-5
    )
