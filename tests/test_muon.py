"""Muon: --optimizer muon."""

import copy

import pytest
import torch
from helpers import same_runs
from torch.testing import assert_close

from diffusion import UserError
from diffusion.config import Config
from diffusion.models.build import build_pixel_unet
from diffusion.training.optimizer import AdamW, Muon, open_optimizer, orthogonal
from diffusion.training.trainer import train

SHAPES = [(32, 16, 3, 3), (64, 16), (16, 64), (24, 24, 1, 1), (7,), (3, 16, 3, 3)]


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """The published iteration, in float64."""
    x = x.double() / x.norm()
    for _ in range(5):
        A = x @ x.T
        x = 3.4445 * x + (-4.775 * A + 2.0315 * A @ A) @ x
    return x.float()


@pytest.mark.parametrize("shape", [(32, 144), (64, 16), (48, 48), (128, 1152)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    x = torch.randn(3, *shape) * torch.tensor([1e-4, 1, 1e4])[:, None, None]
    found = orthogonal(x)
    wide = x if shape[0] <= shape[1] else x.mT
    wanted = torch.stack([newton_schulz(one) for one in wide])
    assert_close(found if shape[0] <= shape[1] else found.mT, wanted, atol=2e-4, rtol=2e-3)
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.25 and values.median() > 0.6
    assert_close(orthogonal(torch.zeros(1, *shape)), torch.zeros(1, *shape))


def test_matrices_of_low_rank_and_with_wide_spectra():
    """Rounding makes eigenvalues that are 0 a little negative; these must not grow."""
    torch.manual_seed(0)
    left, right = torch.randn(256, 3), torch.randn(3, 2304)
    spread = torch.randn(256, 2304) * torch.logspace(0, -8, 256)[:, None]
    for x in (left[:, :1] @ right[:1], left @ right, spread):
        values = torch.linalg.svdvals(orthogonal(x[None]))
        assert values.max() < 1.25
        assert_close(orthogonal(x[None])[0], newton_schulz(x), atol=1e-3, rtol=1e-2)


def weights_of(start):
    weights = [w.clone().requires_grad_() for w in start]
    weights[0].data = weights[0].data.contiguous(memory_format=torch.channels_last)
    return weights


def with_gradients(weights, seed):
    torch.manual_seed(seed)
    for w in weights:
        w.grad = torch.randn(w.shape)
    return [w.grad.clone() for w in weights]


def test_a_step_is_torchs():
    """Against torch.optim.Muon, whose bfloat16 is coarse, and AdamW for what is no matrix."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    start = [torch.randn(s) for s in SHAPES]
    ours = weights_of(start)
    optimizer = Muon(ours, 0.1, ours[:4], weight_decay=0.1)
    theirs = [w.flatten(1).clone().requires_grad_() for w in start[:4]]
    others = [w.clone().requires_grad_() for w in start[4:]]
    muon = torch.optim.Muon(theirs, 0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, 0.1, weight_decay=0.1)
    for step in range(4):
        gradients = with_gradients(ours, step)
        for w, g in zip(theirs + others, gradients):
            w.grad = g.flatten(1) if w.dim() == 2 else g
        optimizer.take_gradients()
        for one in (optimizer, muon, adamw):
            one.step()
    for a, b, c in zip(ours, theirs + others, start):
        moved = (a - c).reshape(b.shape)
        assert (a.reshape(b.shape) - b).norm() < 0.02 * moved.norm()
    assert_close(ours[4:], others)
    state = copy.deepcopy(optimizer.state_dict())
    assert set(state["state"][0]) == {"step", "momentum"} and "exp_avg" in state["state"][4]


def test_state_and_steps_that_are_not_finite():
    torch.manual_seed(0)
    start = [torch.randn(s) for s in SHAPES]
    runs = []
    for broken in (False, True):
        weights = weights_of(start)
        optimizer = Muon(weights, 0.1, weights[:4], weight_decay=0.1)
        for step in range(4):
            with_gradients(weights, step)
            optimizer.take_gradients()
            optimizer.found_inf = torch.tensor(0.0)
            optimizer.step()
            if broken:  # between the steps one that is skipped, and a new start
                with_gradients(weights, 9)
                weights[0].grad.fill_(torch.nan)
                optimizer.take_gradients()
                optimizer.found_inf = torch.tensor(1.0)
                optimizer.step()
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = Muon(weights, 0.1, weights[:4], weight_decay=0.1)
                optimizer.load_state_dict(state)
        runs.append([w.detach() for w in weights])
    assert_close(runs[0], runs[1], atol=0, rtol=0)
    other = AdamW(weights_of(start), 0.1)
    with pytest.raises(ValueError):
        other.load_state_dict(other.state_dict() | {"state": state["state"]})
    state["state"][0]["momentum"] = torch.ones(2)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(state)


def test_which_weights_are_matrices():
    net = build_pixel_unet(16, (1, 2), num_classes=20)
    optimizer = open_optimizer(Config(optimizer="muon"), net)
    names = {name for name, p in net.named_parameters() if p in optimizer.matrices}
    tables = {f"{n}.weight" for n, m in net.named_modules() if isinstance(m, torch.nn.Embedding)}
    assert tables and not tables & names
    for name, p in net.named_parameters():
        wanted = p.dim() > 1 and min(p.shape[:2]) >= 16 and name not in tables
        assert (name in names) == wanted, name
    assert len(names) > 20
    assert type(open_optimizer(Config(), net)) is AdamW
    with pytest.raises(UserError, match="optimizer"):
        options = dict(adapter="lora", optimizer="muon", mode="latent")
        Config(**options).check_use(options)


def test_resume_is_exact(tiny, tmp_path):
    options = tiny | dict(optimizer="muon", unet_dim=16, weight_decay=0.01, train_steps=8)
    train(Config(**options | dict(save_folder=str(tmp_path / "whole"))))
    parts = options | dict(save_folder=str(tmp_path / "parts"))
    train(Config(**parts | dict(train_steps=4)))
    train(Config(**parts))
    same_runs(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(UserError, match="optimizer"):
        train(Config(**parts | dict(optimizer="adamw", train_steps=12)))
