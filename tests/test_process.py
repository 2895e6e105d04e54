"""Noise paths, the forward process, objectives and the loss against closed forms."""

import math
from dataclasses import replace

import pytest
import torch
from mixture import velocity, x0_mean
from torch.testing import assert_close

from diffusion.process.loop import sample
from diffusion.process.objective import (
    LOSSES,
    OBJECTIVES,
    Denoiser,
    error_ratio,
    min_snr_weight,
    p_sample,
    posterior,
    q_sample,
    row,
    training_coefficients,
    training_loss,
    x0_coefficients,
)
from diffusion.process.samplers import D0, NOISE, X, dpmpp, make_table
from diffusion.process.schedule import (
    MAX_BETA,
    SCHEDULES,
    SPACINGS,
    NoisePath,
    make_path,
    make_schedule,
    reinterpret,
    spread,
    timesteps,
)

PATHS = ("vp", "flow", "edm")
EXACT = dict(rtol=1e-10, atol=1e-10)


def previous(s: NoisePath) -> torch.Tensor:
    """alpha_bar of the step before, 1 before the first."""
    return torch.cat([torch.ones(1, dtype=torch.float64), s.alpha_bar[:-1]])


def betas(s: NoisePath) -> torch.Tensor:
    """beta_t = 1 - alpha_bar_t / alpha_bar_{t-1} (DDPM eq. 4)."""
    return 1 - s.alpha_bar / previous(s)


def test_linear_is_ddpm():
    s = make_schedule("linear", 1000)
    beta = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    bar = math.exp(math.fsum(math.log1p(-b) for b in beta))
    assert_close(betas(s), torch.tensor(beta, dtype=torch.float64), rtol=1e-9, atol=1e-12)
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
    assert betas(s)[-1] <= 0.999


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
    assert (betas(s) <= MAX_BETA + 1e-12).all()


def test_zero_terminal_snr():
    plain, zero = make_schedule("linear", 1000), make_schedule("linear", 1000, zero_snr=True)
    assert zero.alpha_bar[-1] == 0 and torch.isinf(zero.lam[-1])
    assert_close(zero.alpha_bar[0], plain.alpha_bar[0], **EXACT)
    assert (zero.alpha_bar.diff() < 0).all()


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


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7, 13, 30, 50])
def test_steps_are_exact_distinct_and_inside(spacing, zero_snr, steps):
    t = timesteps(make_schedule("cosine", 50, zero_snr), steps, spacing)
    assert len(t) == steps and (t.diff() < 0).all() and t[0] <= 49 and t[-1] >= 0
    if spacing not in ("leading", "linspace", "consistency"):
        assert t[0] == 49


def test_the_consistency_spacing_starts_where_x_is_noise():
    """0.4 times the noise levels of u = 0.98 (1, 1/2)."""
    s = make_schedule("cosine", 1000)
    alpha, sigma = s.at(timesteps(s, 2, "consistency"))
    assert_close(sigma / alpha, torch.tensor([19.6, 0.4 * 0.49 / 0.51]).double(), rtol=1e-6, atol=0)


def test_logsnr_is_uniform():
    s = make_schedule("linear", 1000)
    alpha, sigma = s.at(timesteps(s, 20, "logsnr"))
    h = (alpha / sigma).log().diff()
    assert_close(h, h.mean().expand(19), rtol=1e-9, atol=1e-9)


def test_impossible_spacings_are_refused():
    s = make_schedule("linear", 100)
    with pytest.raises(ValueError, match="offset"):
        timesteps(s, 100, "leading", offset=1)
    with pytest.raises(ValueError, match="leading, trailing"):
        timesteps(s, 10, "random")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_more_steps_than_t(spacing):
    t = timesteps(make_schedule("linear", 100), 150, spacing)
    assert len(t) == 150 and t[-1] >= 0 and (t.diff() < 0).all()
    assert t[0] == 99 or spacing == "consistency"


# --- the forward process -----------------------------------------------------------------------


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(6, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return make_schedule("linear", 100), x0, eps, torch.tensor([0, 1, 17, 50, 98, 99])


def test_q_sample_is_the_forward_process(case):
    s, x0, eps, t = case
    bar = s.alpha_bar[t].view(-1, 1, 1, 1)
    expected = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
    assert_close(q_sample(s, x0, t, eps), expected, **EXACT)


def test_forward_moments():
    """x_t of unit-variance data has unit variance at every t."""
    s = make_schedule("cosine", 10)
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(10, 1, 200, 200, generator=g) for _ in range(2))
    std = q_sample(s, x0, torch.arange(10), eps).std((1, 2, 3))
    assert_close(std, torch.ones(10), rtol=0.02, atol=0)


def test_posterior_is_bayes(case):
    """q(x_{t-1} | x_t, x0) from the product of the two Gaussians that it is made of."""
    s, x0, eps, t = case
    t = t.clamp(min=1)
    x_t = q_sample(s, x0, t, eps)
    mean, variance = posterior(s, x0, x_t, t)
    beta, prev = (v[t].view(-1, 1, 1, 1) for v in (betas(s), previous(s)))
    precision = (1 - beta) / beta + 1 / (1 - prev)  # likelihood and prior of x_{t-1}
    expected = ((1 - beta).sqrt() / beta * x_t + prev.sqrt() / (1 - prev) * x0) / precision
    assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    assert_close(variance, 1 / precision, rtol=1e-9, atol=1e-12)


def test_ddpm_steps_by_p_sample_on_every_path(path, case):
    """Over all t, each row of the sampler's table is p_sample; the last adds no noise."""
    _, x0, eps, _ = case
    s = path
    rows = make_table(s, "ddpm", len(s)).to_x.flip(0)
    t = torch.tensor([0, 1, 17, 500, len(s) - 2, len(s) - 1])
    k_x, k_x0, noise = (rows[t][:, c, None, None, None] for c in (X, D0, NOISE))
    x_t = q_sample(s, x0, t, eps)
    z = eps.flip(0)
    assert_close(p_sample(s, x0, x_t, t, z), k_x * x_t + k_x0 * x0 + noise * z, **EXACT)
    assert_close(p_sample(s, x0, x_t, t, z)[0], x0[0], **EXACT)


# --- the loss ------------------------------------------------------------------------------------

DATA_STD = 0.5  # of EDM's preconditioning, and of the closed-form data below
DATA_MEAN = 0.3


def edm_target(alpha, sigma, x0, eps):
    """(y - c_skip x) / c_out (arXiv:2206.00364, eq. 8), for x / alpha at noise level sigma / alpha."""
    level = sigma / alpha
    c_skip = DATA_STD**2 / (level**2 + DATA_STD**2)
    c_out = level * DATA_STD / (level**2 + DATA_STD**2).sqrt()
    return (x0 - c_skip * (x0 + level * eps)) / c_out


TARGETS = {
    "eps": lambda alpha, sigma, x0, eps: eps,
    "x0": lambda alpha, sigma, x0, eps: x0,
    "v": lambda alpha, sigma, x0, eps: alpha * eps - sigma * x0,
    "flow": lambda alpha, sigma, x0, eps: eps - x0,
    "edm": edm_target,
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_of_a_perfect_network_is_zero(case, objective, loss):
    s, x0, eps, t = case
    x0, eps = x0.float(), eps.float()
    alpha, sigma = (v[t].float().view(-1, 1, 1, 1) for v in (s.alpha, s.sigma))
    target = TARGETS[objective](alpha, sigma, x0, eps)
    given = []

    def perfect(x, c_noise, cond):
        given.append((x, c_noise, cond))
        return target

    levels = training_coefficients(s, objective, t, min_snr_gamma=5)
    assert levels.shape == (7, 6) and levels.dtype == torch.float32
    value = training_loss(perfect, levels, x0, eps, "condition", loss)
    assert value.shape == (6,) and value.abs().max() < 1e-6
    [(x, c_noise, cond)] = given
    assert_close(x, q_sample(s, x0, t, eps))
    assert c_noise.tolist() == t.tolist() and cond == "condition"
    levels = training_coefficients(s, objective, t)
    value = training_loss(lambda *args: target + 0.5, levels, x0, eps, loss=loss)
    expected = {"l1": 0.5, "l2": 0.25, "huber": 0.125}[loss]
    assert_close(value, torch.full((6,), expected), rtol=1e-4, atol=1e-5)


def test_min_snr_weight_in_the_loss(case):
    s, x0, eps, t = case
    zeros = lambda x, c_noise, cond: torch.zeros_like(x)
    plain, weighted = (
        training_loss(zeros, training_coefficients(s, "v", t, gamma), x0.float(), eps.float())
        for gamma in (0, 5)
    )
    snr = (s.alpha / s.sigma)[t].float() ** 2
    assert_close(weighted, plain * snr.clamp(max=5) / (snr + 1))


# --- any objective on any path -------------------------------------------------------------------


@pytest.fixture(params=PATHS)
def path(request) -> NoisePath:
    return make_path(request.param, 1000, "v")


@pytest.fixture
def somewhere(path):
    """(alpha, sigma, x0, eps, x_t) at 64 levels, all but the ends; (64, 1) and (64, 8) float64."""
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(64, 8, generator=g, dtype=torch.float64) for _ in range(2))
    t = (0.1 + 0.8 * torch.rand(64, generator=g, dtype=torch.float64)) * (len(path) - 1)
    alpha, sigma = (v[:, None] for v in path.at(t))
    return alpha, sigma, x0, eps, alpha * x0 + sigma * eps


def test_real_valued_t_of_every_path(path):
    t = torch.tensor([0.0, 3.0, 420.25, len(path) - 2.0], dtype=torch.float64)
    alpha, sigma = path.at(t)
    assert_close(alpha[1], path.alpha[3], rtol=0, atol=0)
    assert path.lam[421] < (alpha / sigma).log()[2] < path.lam[420]
    assert_close(path.t_of((alpha / sigma).log()), t, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_output_gives_x0(path, somewhere, objective):
    alpha, sigma, x0, eps, x_t = somewhere
    a, b = row(path, objective, alpha, sigma)
    target = TARGETS[objective](alpha, sigma, x0, eps)
    assert_close(a * x0 + b * eps, target, rtol=1e-12, atol=1e-12)
    c_x, c_out = x0_coefficients(path, objective, alpha, sigma)
    assert_close(c_x * x_t + c_out * target, x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("space", OBJECTIVES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_in_any_space_is_the_networks_own_weighted(path, somewhere, objective, space):
    alpha, sigma, x0, eps, x_t = somewhere
    target = TARGETS[objective](alpha, sigma, x0, eps)
    out = target + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    c_x, c_out = x0_coefficients(path, objective, alpha, sigma)
    their_x0 = c_x * x_t + c_out * out
    their_eps = (x_t - alpha * their_x0) / sigma
    of = TARGETS[space]
    direct = of(alpha, sigma, their_x0, their_eps) - of(alpha, sigma, x0, eps)
    weighted = error_ratio(path, objective, space, alpha, sigma) * (out - target).abs()
    assert_close(weighted, direct.abs(), rtol=0, atol=1e-12 * float(direct.abs().max()))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights(gamma):
    """arXiv:2303.09556, section 3.4; at SNR = 0 their limits."""
    snr = torch.tensor([0.0, 1e-4, 0.5, 5.0, 80.0, 1e6], dtype=torch.float64)
    alpha, sigma = (snr / (snr + 1)).sqrt(), (1 / (snr + 1)).sqrt()
    expected = {
        "eps": (gamma / snr).clamp(max=1),
        "v": snr.clamp(max=gamma) / (snr + 1),
        "x0": snr.clamp(max=gamma),
    }
    path = make_schedule("cosine", 10)
    for objective, weight in expected.items():
        found = min_snr_weight(path, objective, alpha, sigma, gamma)
        assert_close(found, weight, **EXACT)
    assert [float(weight[0]) for weight in expected.values()] == [1, 0, 0]


# --- a run on any path, with a denoiser in closed form ----------------------------------------------


def ideal(path: NoisePath, objective: str):
    """The network E[target | x_t] of data N(DATA_MEAN, DATA_STD^2), in float64.

    It knows its level from c_noise alone, as a trained one does.
    """
    _, known = path.network_inputs(torch.arange(len(path)).double(), path.alpha, path.sigma)

    def network(scaled, c_noise, cond=None):
        t = torch.searchsorted(known, c_noise.double().contiguous()).clamp(1, len(path) - 1)
        low, high = known[t - 1], known[t]
        t = t - 1 + ((c_noise.double() - low) / (high - low)).clamp(0, 1)
        t = torch.where((t - t.round()).abs() < 1e-3, t.round(), t)  # c_noise was float32
        alpha, sigma = path.at(t)
        c_in, _ = path.network_inputs(t, alpha, sigma)
        alpha, sigma, c_in = (v.view(-1, 1, 1, 1) for v in (alpha, sigma, c_in))
        x = scaled.double() / c_in
        variance = alpha**2 * DATA_STD**2 + sigma**2
        x0 = DATA_MEAN + alpha * DATA_STD**2 / variance * (x - alpha * DATA_MEAN)
        a, b = row(path, objective, alpha, sigma)
        return a * x0 + b * (x - alpha * x0) / sigma

    return network


ON_PATHS = [
    ("vp", "v"),
    ("vp", "edm"),
    ("flow", "flow"),
    ("flow", "v"),
    ("edm", "edm"),
    ("edm", "eps"),
]


@pytest.mark.parametrize("name, objective", ON_PATHS)
def test_the_loss_of_an_ideal_network(name, objective):
    """Var(x0 | x_t), in the space of the objective; t is drawn as the path says."""
    path = make_path(name, 1000, objective)
    g = torch.Generator().manual_seed(0)
    t = path.sample_t(40, g).double()
    t = t.clamp(1, 0.98 * len(path))  # at the ends float32 cancels
    x0 = DATA_MEAN + DATA_STD * torch.randn(40, 1, 64, 64, generator=g)
    eps = torch.randn(x0.shape, generator=g)
    levels = training_coefficients(path, objective, t)
    found = training_loss(ideal(path, objective), levels, x0, eps).double()
    alpha, sigma = path.at(t)
    variance = DATA_STD**2 * sigma**2 / (alpha**2 * DATA_STD**2 + sigma**2)
    expected = variance * error_ratio(path, "x0", objective, alpha, sigma) ** 2
    assert_close(found / expected, torch.ones(40).double(), rtol=0, atol=0.12)
    assert_close((found / expected).mean().item(), 1.0, rtol=0, atol=0.01)


@pytest.mark.parametrize("sampler, steps", [("ddim", 400), ("dpmpp_2m", 50), ("dpmpp_2m_sde", 100)])
@pytest.mark.parametrize("name, objective", ON_PATHS)
def test_an_ideal_network_samples_its_data(name, objective, sampler, steps):
    path = make_path(name, 1000, objective)
    g = torch.Generator().manual_seed(2)
    draw = lambda: torch.randn(8, 1, 40, 40, generator=g)
    denoise = Denoiser(ideal(path, objective), path, objective)
    table = make_table(path, sampler, steps, spacing="logsnr")
    start = path.prior_std(*table.levels[0].tolist())
    x = sample(denoise, start * draw(), table, noise=draw, clip=False)
    assert_close(x.mean().item(), DATA_MEAN, rtol=0, atol=0.02)
    assert_close(x.std().item(), DATA_STD, rtol=0.03, atol=0)


@pytest.mark.parametrize("name", ["flow", "edm"])
@pytest.mark.parametrize("objective", ["eps", "v"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_vp_network_read_on_another_path_makes_its_own_pictures(name, objective, zero_snr):
    """At equal log-SNR: Stable Diffusion as a flow (arXiv:2506.02221)."""
    if zero_snr and objective == "eps":
        return
    base = make_schedule("scaled_linear", 1000, zero_snr)
    path = reinterpret(base, name)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    lam = torch.linspace(-2, 3, 12, dtype=torch.float64)

    def network(x, t):
        """What a VP network says, which is given its own levels only."""
        alpha, sigma = (v.view(-1, 1) for v in base.at(t.double()))
        x = x.double()
        assert ((t >= 0) & (t <= 999)).all()
        x0 = x0_mean(x, alpha[0], sigma[0])
        return TARGETS[objective](alpha, sigma, x0, (x - alpha * x0) / sigma)

    ends = []
    for p in (base, path):
        t = p.t_of(lam)
        levels = torch.cat([torch.stack(p.at(t), 1), torch.tensor([[1.0, 0.0]]).double()])
        assert_close((levels[:-1, 0] / levels[:-1, 1]).log(), lam, rtol=0, atol=1e-9)
        table = make_table(base, "dpmpp_2m", 12)
        rows = dpmpp(levels)
        table = replace(table, t=t, levels=levels, to_x=rows.to_x, to_y=rows.to_y)
        start = x * p.prior_std(*levels[0].tolist())
        ends.append(sample(Denoiser(network, p, objective), start, table, clip=False))
    assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)
    low, high = path.lam[[-1, 0]]
    finite = base.lam[base.lam.isfinite()]
    assert_close(torch.stack([low, high]), finite[[-1, 0]], rtol=1e-9, atol=1e-9)


def test_a_networks_own_loss_on_another_path_is_given_what_it_knows():
    """x_t is the flow's; the network gets it at its own level, and its own target."""
    base = make_schedule("scaled_linear", 1000)
    path = reinterpret(base, "flow")
    t = torch.tensor([0.0, 250.5, 999.0])
    alpha, sigma, c_in, c_noise, a, b, weight = training_coefficients(
        path, "v", t, loss_space="flow", t_eps=0.0
    ).double()
    assert_close(alpha + sigma, torch.ones(3).double(), rtol=0, atol=1e-6)
    vp_alpha, vp_sigma = base.at(base.t_of((alpha / sigma).log()))
    assert_close(c_in * alpha, vp_alpha, rtol=1e-4, atol=1e-5)
    assert_close(base.at(c_noise)[0], vp_alpha, rtol=1e-4, atol=1e-5)
    assert_close(torch.stack([a, b]), torch.stack([-vp_sigma, vp_alpha]), rtol=1e-4, atol=1e-5)
    x0, eps = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t = alpha * x0 + sigma * eps
    out = a * x0 + b * eps + 0.01
    c_x, c_out = x0_coefficients(path, "v", alpha, sigma)
    their_x0 = c_x * x_t + c_out * out
    error = (x_t - their_x0) / sigma - (eps - x0)  # of the velocity, (x - x0) / sigma
    assert_close(weight, (error / 0.01) ** 2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PATHS)
def test_noise_starts_with_the_deviation_of_its_level(name):
    """Of all noise where nothing is left of the image; VP: 1, as it was trained."""
    path = make_path(name, 1000, "v")
    for sampler in ("ddim", "heun"):
        alpha, sigma = make_table(path, sampler, 10, spacing="logsnr").levels[0].tolist()
        expected = {"vp": 1, "flow": 1, "edm": 80}[name]
        assert path.prior_std(alpha, sigma) == pytest.approx(expected, abs=1e-9)
    late = make_table(path, "ddim", 10, spacing="leading").levels[0].tolist()
    assert path.prior_std(*late) == (1 if name == "vp" else late[1])


def test_a_path_where_eps_says_nothing_starts_above():
    for objective, last in (("eps", 0.999), ("edm", 0.999), ("v", 1), ("x0", 1), ("flow", 1)):
        path = make_path("flow", 1000, objective)
        assert float(path.sigma[-1]) == pytest.approx(last, abs=1e-12)
        c_x, c_out = x0_coefficients(path, objective, path.alpha, path.sigma)
        assert c_x.isfinite().all() and c_out.isfinite().all()


# --- published formulas ----------------------------------------------------------------------------


def toy_network(x, c_noise, cond=None):
    return torch.tanh(x) * (1 + c_noise.view(-1, 1, 1, 1)) - 0.3


def test_edms_denoiser_and_loss_are_its_formulas():
    """arXiv:2206.00364, table 1: D(x; sigma) of F, and lambda(sigma) |D(y + n) - y|^2."""
    path = make_path("edm", 1000, "edm", sigma_data=0.6)
    g = torch.Generator().manual_seed(0)
    y, n = (torch.randn(6, 3, 4, 4, generator=g) for _ in range(2))
    t = torch.linspace(0, 999, 6, dtype=torch.float64)
    sigma = 0.002 * (80 / 0.002) ** (t / 999)
    s = 0.6
    c_skip = s**2 / (sigma**2 + s**2)
    c_out = sigma * s / (s**2 + sigma**2).sqrt()
    c_in = 1 / (s**2 + sigma**2).sqrt()
    c_noise = sigma.log() / 4
    weight = (sigma**2 + s**2) / (sigma * s) ** 2
    wide = lambda v: v.float().view(-1, 1, 1, 1)
    x = y + wide(sigma) * n
    D = wide(c_skip) * x + wide(c_out) * toy_network(wide(c_in) * x, c_noise.float())
    alpha, _ = path.at(t)
    k = Denoiser(toy_network, path, "edm").coefficients(t, alpha, sigma)
    for i in range(6):
        row = torch.cat([k[i], torch.ones(1)]).float()
        found = Denoiser(toy_network, path, "edm")(x[i : i + 1], row)
        assert_close(found, D[i : i + 1], rtol=1e-5, atol=1e-5)
    loss = training_loss(toy_network, training_coefficients(path, "edm", t), y, n)
    expected = weight.float() * ((D - y) ** 2).mean((1, 2, 3))
    assert_close(loss[1:], expected[1:], rtol=1e-4, atol=1e-5)  # at the first, float32 cancels


def test_a_flows_velocity_is_that_of_a_mixture():
    """E[eps - x0 | x_u], from the predicted x0, is dx/du of the mixture."""
    path = make_path("flow", 1000, "flow")
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (50.0, 400.25, 900.0):
        alpha, sigma = path.at(torch.tensor([t]))
        out = velocity(x, sigma)
        c_x, c_out = x0_coefficients(path, "flow", alpha, sigma)
        assert_close(c_x * x + c_out * out, x0_mean(x, alpha, sigma), rtol=0, atol=1e-12)


def test_t_eps_bounds_the_denominator_of_jit():
    """arXiv:2511.13720: v = (x0 - z) / max(1 - t, 0.05), of what is predicted and of the truth."""
    path = make_path("flow", 1000, "x0")
    alpha, sigma = path.at(torch.tensor([0.0, 20.0, 49.0, 50.0, 500.0, 999.0]))
    found = error_ratio(path, "x0", "flow", alpha, sigma, t_eps=0.05)
    assert_close(found, 1 / sigma.clamp(min=0.05), **EXACT)
    weight = training_coefficients(path, "x0", torch.tensor([3.0]), loss_space="flow")[-1]
    assert weight.item() == pytest.approx(400)
    weight = training_coefficients(path, "x0", torch.tensor([3.0]), loss_space="flow", power=1)[-1]
    assert weight.item() == pytest.approx(20)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("mean, std, shift", [(0.0, 1.0, 1.0), (-0.8, 0.8, 1.0), (0.2, 0.5, 3.0)])
def test_noise_levels_are_normal_and_shifted(name, mean, std, shift):
    """ln(sigma / alpha) has this mean and deviation; a flow's u is then logit-normal."""
    for dist in ("lognormal", "logit_normal"):
        path = spread(make_path(name, 1000, "v"), dist, mean, std, shift)
        u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        alpha, sigma = path.at(path.quantile(u))
        ratio = (sigma / alpha).log()
        assert ratio.mean().item() == pytest.approx(mean + math.log(shift), abs=0.01)
        assert ratio.std().item() == pytest.approx(std, abs=0.01)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_shift_moves_uniform_times(name, shift):
    """u' = s u / (1 + (s - 1) u) (arXiv:2403.03206, eq. 23), and stays within the path's ends."""
    plain = make_path(name, 1000, "v")
    u = torch.tensor([0.05, 0.3, 0.7, 0.95], dtype=torch.float64)
    t = plain.stratified_t(1000 * u - 0.5, 1000)
    alpha, sigma = plain.at(t.double())
    time = sigma / (alpha + sigma)
    expected = shift * time / (1 + (shift - 1) * time)
    alpha, sigma = plain.at(
        spread(plain, "uniform", shift=shift).stratified_t(1000 * u - 0.5, 1000)
    )
    inside = (sigma / alpha).log().abs() < plain.lam[[0, -1]].abs().min() - 0.01
    assert_close((sigma / (alpha + sigma))[inside], expected[inside], rtol=0, atol=4e-3)
    assert inside.sum() >= 2


def test_flow_spacing_is_uniform_in_its_time():
    """From 1 to 1 / N, then shifted; on another path between its ends."""
    path = make_path("flow", 1000, "flow")
    for shift in (1.0, 3.0):
        u = torch.arange(10, 0, -1).double() / 10
        expected = shift * u / (1 + (shift - 1) * u)
        assert_close(path.at(timesteps(path, 10, "flow", shift=shift))[1], expected, **EXACT)
        vp = make_schedule("scaled_linear", 1000)
        t = timesteps(vp, 100, "flow", shift=shift)
        assert t[0] == 999 and (t.diff() < 0).all() and len(t) == 100


def test_training_draws_t_as_its_quantile_says():
    """EDM's log-normal: the median is exp(-1.2), one deviation is 1.2; all of it, evenly."""
    path = spread(make_path("edm", 1000, "edm"), "lognormal", -1.2, 1.2)
    drawn = path.sample_t(20_000, torch.Generator().manual_seed(0))
    even = path.stratified_t(torch.randperm(2000, generator=torch.Generator().manual_seed(0)), 2000)
    for t, tolerance in ((drawn, 0.03), (even, 0.005)):
        assert 0 <= t.min() and t.max() <= len(path) - 1
        log_sigma = path.at(t)[1].log()
        assert log_sigma.mean().item() == pytest.approx(-1.2, abs=tolerance)
        assert log_sigma.std().item() == pytest.approx(1.2, abs=tolerance)
    plain = make_schedule("cosine", 50)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    t = plain.stratified_t(order, 100)
    assert t.dtype == torch.int64 and t.sort().values.tolist() == [i // 2 for i in range(100)]
    drawn = plain.sample_t(5000, torch.Generator().manual_seed(0))
    assert drawn.unique().tolist() == list(range(50))


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
    x_t = q_sample(s, x0, t, eps)
    assert_close(x_t, theirs.q_sample(x0, t, eps), rtol=1e-4, atol=1e-5)
    mean, variance = posterior(s, x0, x_t, t)
    their_mean, their_variance, _ = theirs.q_posterior(x0, x_t, t)
    assert_close(mean, their_mean, rtol=1e-3, atol=1e-4)
    assert_close(variance, their_variance, rtol=1e-3, atol=1e-7)
    a, b = (v.float().view(-1, 1, 1, 1) for v in row(s, "v", s.alpha[t], s.sigma[t]))
    assert_close(a * x0 + b * eps, theirs.predict_v(x0, t, eps), rtol=1e-4, atol=1e-5)
