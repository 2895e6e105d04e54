"""Solvers against their order of convergence, diffusers step by step, and k-diffusion's formulas.

The data are a mixture of Gaussians, whose denoiser is known exactly and is far from linear.
"""

import math

import mixture
import pytest
import torch
from mixture import run, x0_mean
from torch.testing import assert_close

from diffusion.process import samplers
from diffusion.process.samplers import Table, make_table
from diffusion.process.schedule import make_path, make_schedule

EXACT = dict(rtol=1e-11, atol=1e-11)
NEAR = dict(rtol=2e-4, atol=2e-4)  # of diffusers, whose levels are in float32


@pytest.fixture
def x():
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def draws(n, like):
    g = torch.Generator().manual_seed(7)
    return [torch.randn(like.shape, generator=g, dtype=like.dtype) for _ in range(n)]


# --- order of convergence ------------------------------------------------------------------------

ORDERS = {
    "ddim": 1,
    "dpmpp_2m": 2,
    "dpmpp_3m": 2,  # phi_3 lacks the factor 2 of the Taylor series, as published
    "adams4": 4,
    "deis": 3,
    "unipc2": 3,  # the corrector adds one
    "unipc3": 4,
    "heun": 2,
    "dpm2": 2,
}


@pytest.fixture(scope="module")
def exact():
    g = torch.Generator().manual_seed(0)
    start = 500 * torch.randn(8, 16, generator=g, dtype=torch.float64)
    return start, mixture.solve(start, 500, 0.02)


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(exact, name):
    """Halving steps that are even in log-SNR divides the error by 2^order.

    From far out, where x0 hardly changes: the first rows have a shorter history and a lower order.
    """
    start, end = exact
    path = make_path("edm", 1000, "edm", sigma_min=0.02, sigma_max=500)
    errors = []
    for steps in (81, 161, 321):
        table = make_table(path, name, steps, spacing="logsnr", final="alpha_bar_0")
        errors.append(float((run(table, start)[-1] - end).square().mean().sqrt()))
    measured = math.log2(errors[1] / errors[2])
    assert ORDERS[name] - 0.2 < measured < ORDERS[name] + 0.8, (measured, errors)


# --- diffusers -----------------------------------------------------------------------------------

BETAS = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)
MULTISTEP = {  # sampler: scheduler, its options, where the last row ends, states alike at the end
    "dpmpp_2m": ("DPMSolverMultistep", dict(solver_order=2, euler_at_final=True), "zero"),
    "dpmpp_3m": ("DPMSolverMultistep", dict(solver_order=3, euler_at_final=True), "zero"),
    "dpmpp_2m_sde": (
        "DPMSolverMultistep",
        dict(solver_order=2, algorithm_type="sde-dpmsolver++", euler_at_final=True),
        "zero",
    ),
    # not 3m's SDE form: its last term, - 0.5, has the wrong sign there; k-diffusion's is below
    "deis": ("DEISMultistep", dict(solver_order=3), "alpha_bar_0"),
    "unipc2": ("UniPCMultistep", dict(solver_order=2, lower_order_final=False), "zero"),
    "unipc3": ("UniPCMultistep", dict(solver_order=3, lower_order_final=False), "zero"),
}


def diffusers(name, **options):
    library = pytest.importorskip(
        "diffusers", reason="oracle not installed: tests/requirements.txt"
    )
    return getattr(library, f"{name}Scheduler")(**BETAS, **options)


@pytest.mark.parametrize("steps", [16, 20])
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_is_diffusers(x, name, steps):
    kind, options, final = MULTISTEP[name]
    final_sigmas = {} if kind == "DEISMultistep" else {"final_sigmas_type": final}
    theirs = diffusers(kind, timestep_spacing="trailing", **options, **final_sigmas)
    theirs.set_timesteps(steps)
    schedule = make_schedule("scaled_linear", 1000)
    table = make_table(schedule, name, steps, spacing="trailing", final=final)
    assert table.t.tolist() == theirs.timesteps.tolist()
    noise = draws(steps, x)
    ours = run(table, x, noise)
    for i, t in enumerate(theirs.timesteps):
        assert_close(x, ours[i], **NEAR)
        if "unipc" in name and i == steps - 1:
            break  # theirs is singular at sigma = 0
        alpha, sigma = table.levels[i]
        eps = (x - alpha * x0_mean(x, alpha, sigma)) / sigma
        more = {"variance_noise": noise[i]} if "sde" in name else {}
        x = theirs.step(eps, t, x, **more).prev_sample
    else:
        assert_close(x, ours[-1], **NEAR)


@pytest.mark.parametrize(
    "name, kind", [("heun", "HeunDiscrete"), ("ddpm", "EulerAncestralDiscrete")]
)
def test_in_sigma_over_alpha_is_diffusers(x, name, kind, monkeypatch):
    theirs = diffusers(kind, timestep_spacing="trailing")
    steps = 10
    theirs.set_timesteps(steps)
    evaluations = len(theirs.timesteps)
    schedule = make_schedule("scaled_linear", 1000)
    table = make_table(schedule, name, evaluations, spacing="trailing")
    assert table.t.tolist() == theirs.timesteps.tolist()
    noise = draws(evaluations, x)
    if name == "ddpm":
        queue = iter(noise)
        module = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
        monkeypatch.setattr(module, lambda *a, **k: next(queue))
    ours = run(table, x, noise)
    y = x / table.levels[0, 0]
    for i, t in enumerate(theirs.timesteps):
        alpha, sigma = table.levels[i]
        assert_close(y, ours[i] / alpha, rtol=1e-3, atol=1e-3, check_dtype=False)
        eps = alpha * (y - x0_mean(alpha * y, alpha, sigma)) / sigma
        theirs.is_scale_input_called = True
        y = theirs.step(eps, t, y).prev_sample
    assert_close(y, ours[-1], rtol=1e-3, atol=1e-3, check_dtype=False)


def test_ipndm_is_diffusers(x):
    """At its levels; the last row, whose step in log-SNR is infinite, is of first order here."""
    library = pytest.importorskip(
        "diffusers", reason="oracle not installed: tests/requirements.txt"
    )
    theirs = library.IPNDMScheduler()
    theirs.set_timesteps(12)
    levels = torch.stack([theirs.alphas, theirs.betas], 1).double()
    levels[0] = torch.tensor(
        [0.05, (1 - 0.05**2) ** 0.5]
    )  # alpha is 0 there, and x0 would not be defined
    theirs.alphas, theirs.betas = levels.T
    table = table_of(levels, samplers.MAKERS["ipndm"](levels, 0.0))
    ours = run(table, x)
    for i, t in enumerate(theirs.timesteps[:-1]):
        alpha, sigma = levels[i]
        eps = (x - alpha * x0_mean(x, alpha, sigma)) / sigma
        # the scheduler reads eps as sigma x + alpha out
        x = theirs.step((eps - sigma * x) / alpha, t, x).prev_sample
        assert_close(x, ours[i + 1], **NEAR)


def table_of(levels, rows) -> Table:
    n = len(levels) - 1
    keep = torch.tensor([0.0, 1.0]).double().expand(n, 2) if rows.keep is None else rows.keep
    zeros = torch.zeros(n).double()
    return Table(zeros, levels, rows.to_x, rows.to_y, keep, zeros + 1, "", n, "", 0.0, 1.0)


def test_lcm_is_diffusers(x, monkeypatch):
    theirs = diffusers("LCM")
    theirs.set_timesteps(timesteps=[999, 799, 599, 399, 199])
    table = make_table(make_schedule("scaled_linear", 1000), "lcm", 5, spacing="trailing")
    assert table.t.tolist() == theirs.timesteps.tolist()
    noise = draws(5, x)
    queue = iter(noise)
    module = "diffusers.schedulers.scheduling_lcm.randn_tensor"
    monkeypatch.setattr(module, lambda *a, **k: next(queue))
    ours = run(table, x, noise)
    for i, t in enumerate(theirs.timesteps):
        alpha, sigma = table.levels[i]
        eps = (x - alpha * x0_mean(x, alpha, sigma)) / sigma
        x = theirs.step(eps, t, x).prev_sample
        assert_close(x, ours[i + 1], **NEAR)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_euler_is_diffusers(x, shift):
    library = pytest.importorskip(
        "diffusers", reason="oracle not installed: tests/requirements.txt"
    )
    theirs = library.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])
    path = make_path("flow", 1000, "flow")
    table = make_table(path, "euler", 8, spacing="flow", shift=shift)
    assert_close(table.levels[:, 1], theirs.sigmas.double(), rtol=1e-6, atol=1e-7)
    ours = run(table, x)
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(mixture.velocity(x, table.levels[i, 1]), t, x).prev_sample
        assert_close(x, ours[i + 1], rtol=1e-5, atol=1e-5, check_dtype=False)


# --- k-diffusion, whose x is x0 + sigma eps --------------------------------------------------------


def denoise(x, sigma):
    return x0_mean(x, torch.ones(()).double(), sigma)


def slope(x, sigma):
    return (x - denoise(x, sigma)) / sigma


def of_edm(name, steps, **options) -> tuple[Table, torch.Tensor]:
    path = make_path("edm", 1000, "edm", sigma_min=0.02, sigma_max=20)
    table = make_table(path, name, steps, spacing="karras", **options)
    return table, table.levels[:, 1]


def test_euler_ancestral_is_k_diffusions(x):
    table, sigma = of_edm("euler_a", 12)
    noise = draws(12, x)
    x = 20 * x
    ours = run(table, x, noise)
    for i in range(12):
        now, to = sigma[i], sigma[i + 1]
        up = (to**2 * (now**2 - to**2) / now**2).sqrt()
        down = (to**2 - up**2).sqrt()
        x = x + slope(x, now) * (down - now) + up * noise[i]
        assert_close(ours[i + 1], x, **EXACT)


@pytest.mark.parametrize("name, eta", [("dpmpp_3m", 0.0), ("dpmpp_3m_sde", 1.0)])
def test_dpmpp_3m_is_k_diffusions(x, name, eta):
    """From the third row; the second one takes the midpoint rule, as diffusers has it."""
    table, sigma = of_edm(name, 12)
    noise = draws(12, x)
    ours = run(table, 20 * x, noise)
    known = [denoise(ours[i], sigma[i]) for i in range(12)]
    for i in range(2, 11):
        h, h_1, h_2 = (-(sigma[j + 1] / sigma[j]).log() for j in (i, i - 1, i - 2))
        h_eta = h * (eta + 1)
        x = torch.exp(-h_eta) * ours[i] - torch.expm1(-h_eta) * known[i]
        r0, r1 = h_1 / h, h_2 / h
        d1_0 = (known[i] - known[i - 1]) / r0
        d1_1 = (known[i - 1] - known[i - 2]) / r1
        d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
        d2 = (d1_0 - d1_1) / (r0 + r1)
        phi_2 = torch.expm1(-h_eta) / h_eta + 1
        phi_3 = phi_2 / h_eta - 0.5
        x = x + phi_2 * d1 - phi_3 * d2
        x = x + noise[i] * sigma[i + 1] * (-torch.expm1(-2 * h * eta)).sqrt()
        assert_close(ours[i + 1], x, **EXACT)
    assert_close(ours[12], known[11], **EXACT)


def two_stage(x, sigma, evaluations, name, churn=0.0, noise=None):
    """k-diffusion's sample_heun and sample_dpm_2, with the state after each evaluation."""
    states, n = [], len(sigma) - 1
    gamma = min(churn / n, 2**0.5 - 1)
    for i in range(n):
        hat = sigma[i] * (1 + gamma) if i else sigma[i]
        if i and gamma:  # drawn with the evaluation before
            x = x + noise[len(states) - 1] * (hat**2 - sigma[i] ** 2).sqrt()
            states[-1] = x
        d = slope(x, hat)
        dt = sigma[i + 1] - hat
        if i >= (evaluations - 1) // 2:
            x = x + d * dt
            states.append(x)
        elif name == "heun":
            x_2 = x + d * dt
            x = x + (d + slope(x_2, sigma[i + 1])) / 2 * dt
            states += [x_2, x]
        else:
            mid = (hat * sigma[i + 1]).sqrt()
            x_2 = x + d * (mid - hat)
            x = x + slope(x_2, mid) * dt
            states += [x_2, x]
    return states


@pytest.mark.parametrize("evaluations", [1, 2, 9, 10])
@pytest.mark.parametrize("kind", ["edm", "flow"])
@pytest.mark.parametrize(
    "name, churn", [("heun", 0.0), ("heun", 2.0), ("heun", 40.0), ("dpm2", 0.0)]
)
def test_two_stages_are_k_diffusions(x, name, churn, kind, evaluations):
    """On any path: theirs is x / alpha at the level sigma / alpha."""
    path = make_path(kind, 1000, "eps", sigma_min=0.02, sigma_max=20)
    table = make_table(path, name, evaluations, spacing="karras", churn=churn)
    plain = make_table(path, "ddim", evaluations // 2 + 1, spacing="karras")  # the same steps
    noise = draws(evaluations, x)
    ratio = plain.levels[:, 1] / plain.levels[:, 0]
    x = path.prior_std(*table.levels[0].tolist()) * x
    expected = two_stage(x / table.levels[0, 0], ratio, evaluations, name, churn, noise)
    assert len(expected) == evaluations == len(table)
    for i, ours in enumerate(run(table, x, noise)[1:]):
        ours = ours / table.levels[i + 1, 0]
        assert_close(ours, expected[i], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("evaluations", [2, 3, 9, 10])
def test_a_step_from_noise_alone_takes_one_evaluation(evaluations):
    """Where alpha is 0 it is of first order; the others take two but the last, and if need be one."""
    table = make_table(make_path("flow", 1000, "flow"), "heun", evaluations, spacing="flow")
    waits = (table.to_x != table.to_y).any(1)
    assert not waits[0] and not waits[-1] and waits.sum() == (evaluations - 2) // 2
    assert len(table) == evaluations
