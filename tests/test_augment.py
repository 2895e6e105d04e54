"""--augment: what is done to images, by hand; that the network is given it; runs."""

import json

import pytest
import torch
from conftest import script
from helpers import CPU, flags, plain, same, same_runs
from torch.testing import assert_close

from diffusion import UserError
from diffusion.config import Config, config_from_args
from diffusion.data.augment import augment, augmentations
from diffusion.files import checkpoint
from diffusion.models.cond import Cond
from diffusion.sampling.load import build_network, load
from diffusion.training.finetune_config import resolve_config
from diffusion.training.recipe import heldout_loss, open_recipe
from diffusion.training.trainer import train


def vector(mirror=0, turns=0, scale=0.0, right=0.0, down=0.0) -> torch.Tensor:
    """One vector, of a number of quarter turns; right, down: in eighths of the side."""
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[turns]
    turn = torch.tensor([[cos, -sin], [sin, cos]]).float()
    linear = torch.tensor([[1.0 - 2 * mirror, 0], [0, 1]]) @ turn / 2 ** (scale / 5)
    shift = -torch.tensor([[right], [down]]) / 4
    return (torch.cat([linear, shift], 1) - torch.eye(2, 3)).view(1, 6)


@pytest.fixture(params=[32, 16, 24])
def x(request) -> torch.Tensor:
    return torch.randn(1, 3, request.param, request.param)


def test_mirroring_and_turns_are_torchs(x):
    assert_close(augment(x, vector(mirror=1)), x.flip(3), rtol=0, atol=1e-5)
    for turns in (1, 2, 3):
        by_hand = x.rot90(turns, (2, 3))
        assert_close(augment(x, vector(turns=turns)), by_hand, rtol=0, atol=1e-5)
        both = augment(x, vector(mirror=1, turns=turns))
        assert_close(both, x.flip(3).rot90(turns, (2, 3)), rtol=0, atol=1e-5)


def test_shifts_are_rolls_and_reflect(x):
    side = x.shape[2]
    right, down = side // 8, -(side // 8) // 2
    moved = augment(x, vector(right=1, down=8 * down / side))
    inside = (..., slice(None, down), slice(right, None))
    assert_close(moved[inside], x.roll((down, right), (2, 3))[inside], rtol=0, atol=1e-5)
    # what comes in is the image, reflected at the edge
    assert_close(moved[..., 0, :right], x[..., -down, :right].flip(2), rtol=0, atol=1e-5)
    # the shift comes first
    turned = augment(x, vector(mirror=1, turns=1, right=1))
    by_hand = x.roll(right, 3).flip(3).rot90(1, (2, 3))
    margin = (..., slice(right, -right), slice(right, -right))
    assert_close(turned[margin], by_hand[margin], rtol=0, atol=1e-5)


def test_scale_is_about_the_centre():
    """Of a ramp, where bilinear interpolation is exact; 2^(5/5) doubles, 2^(-5/5) halves."""
    ramp = torch.arange(32.0) - 15.5
    x = (ramp[:, None] + 100 * ramp).expand(1, 1, 32, 32)
    assert_close(augment(x, vector(scale=5)), x / 2, rtol=0, atol=1e-3)
    half = augment(x, vector(scale=-5))
    assert_close(half[..., 9:-9, 9:-9], 2 * x[..., 9:-9, 9:-9], rtol=0, atol=1e-3)


def test_zeros_change_nothing():
    x = torch.randn(4, 3, 20, 20)
    vectors = torch.zeros(4, 6)
    assert torch.equal(augment(x, vectors), x)
    vectors[2, 0] = 1  # each image for itself
    assert torch.equal(augment(x, vectors)[[0, 1, 3]], x[[0, 1, 3]])
    assert torch.equal(augment(x, augmentations(4, 0.0, 20, 20, torch.Generator())), x)


def test_distribution():
    n, p = 100_000, 0.3
    vectors = augmentations(n, p, 64, 64, torch.Generator().manual_seed(1))
    A = vectors.view(n, 2, 3) + torch.eye(2, 3)
    near = dict(rtol=0, atol=0.006)  # four standard deviations of a fraction
    mean = lambda values: float(values.float().mean())
    determinant = A[..., :2].det()
    mirrored = determinant < 0
    assert_close(mean(mirrored), p / 2, **near)
    scale = -5 * determinant.abs().sqrt().log2()
    scaled = scale.abs() > 1e-5
    assert_close(mean(scaled), p, **near)
    assert_close(float(scale[scaled].std()), 1.0, rtol=0, atol=0.02)
    sine, cosine = (A[:, 1, :2] / determinant.abs().sqrt()[:, None]).T
    for cos, sin in ((0, 1), (-1, 0), (0, -1)):
        quarter = ((cosine - cos).abs() < 1e-5) & ((sine - sin).abs() < 1e-5)
        assert_close(mean(quarter), p / 4, **near)
        assert_close(mean(quarter & mirrored), p * p / 8, **near)  # independent
    shift = -32 * A[..., 2]  # in pixels
    assert torch.equal(shift.round(), shift) and shift.abs().max() == 8
    moved = shift != 0
    assert_close(mean(moved[:, 0]), p * 15 / 16, **near)  # of 17 numbers, the ends half as often
    assert_close(mean(moved.all(1)), p * (15 / 16) ** 2, **near)  # both or none
    assert_close(mean(mirrored & scaled), p * p / 2, **near)
    linear = A[..., :2] @ A[..., :2].mT  # no other turn, and nothing is stretched
    assert_close(linear, determinant.abs()[:, None, None] * torch.eye(2).expand(n, 2, 2))


def test_images_that_are_not_square():
    """They are shifted by whole pixels of each side, and turned upside down at most."""
    x = torch.randn(1000, 1, 16, 48)
    vectors = augmentations(1000, 0.5, 16, 48, torch.Generator().manual_seed(3))
    A = vectors.view(-1, 2, 3) + torch.eye(2, 3)
    assert torch.equal(A[:, 0, 1].abs() + A[:, 1, 0].abs(), torch.zeros(1000))
    right, down = (-A[:, 0, 2] * 24).round(), (-A[:, 1, 2] * 8).round()
    assert (right.abs().max(), down.abs().max()) == (6, 2)
    whole = A[:, 1, 1].abs() == 1
    assert whole.any() and (A[:, 1, 1] == -1).any()
    y = augment(x, vectors)
    for i in whole.nonzero().flatten().tolist():
        by_hand = x[i].roll((int(down[i]), int(right[i])), (1, 2))
        by_hand = by_hand.flip(2) if A[i, 0, 0] < 0 else by_hand
        by_hand = by_hand.flip(1) if A[i, 1, 1] < 0 else by_hand
        inside = (slice(None), slice(2, -2), slice(6, -6))
        assert_close(y[i][inside], by_hand[inside], rtol=0, atol=1e-4)


# --- networks ------------------------------------------------------------------------------------


def test_no_weights_without_the_option(tiny):
    plain_weights = build_network(Config(**tiny), 3).state_dict()
    torch.manual_seed(0)
    without = build_network(Config(**tiny), 3)
    torch.manual_seed(0)
    network = build_network(Config(**tiny, augment=0.1), 3)
    own = network.state_dict()
    assert (
        own.keys() - plain_weights.keys() == {"vector.weight"} and own["vector.weight"].any() == 0
    )
    del own["vector.weight"]
    same(dict(own), dict(without.state_dict()))


def test_the_vector_shifts_the_embedding(tiny):
    network = build_network(Config(**tiny, augment=0.1), 3).eval()
    torch.nn.init.normal_(network.out.weight)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 9.0])
    zero, told = (Cond(vector=v) for v in (torch.zeros(2, 6), torch.ones(2, 6)))
    assert torch.equal(network(x, t), network(x, t, zero))
    assert torch.equal(network(x, t), network(x, t, told))  # weights of zero
    torch.nn.init.normal_(network.vector.weight)
    assert torch.equal(network(x, t), network(x, t, zero))
    assert not torch.allclose(network(x, t), network(x, t, told), atol=1e-3)


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tiny):
    return open_recipe(Config(**tiny, augment=0.5), CPU)


def test_what_a_sample_gets_depends_on_seed_step_and_place(tiny, recipe):
    (draw,), (again,), (other,) = recipe.draw(3), recipe.draw(3), recipe.draw(4)
    assert torch.equal(draw.augment, again.augment)
    assert not torch.equal(draw.augment, other.augment)
    assert torch.equal(draw[2:5].augment, draw.augment[2:5])
    (without,) = open_recipe(Config(**tiny), CPU).draw(3)
    assert without.augment is None and torch.equal(without.eps, draw.eps)


def test_the_network_is_told_what_was_done(tiny, recipe):
    (draw,) = recipe.draw(0)
    batch = recipe.batches(0, 0, 8)
    inputs = recipe.inputs_of(0, batch, [draw], 0, 8)
    images = open_recipe(Config(**tiny), CPU).codec.x0(batch)
    assert torch.equal(inputs.cond.vector, draw.augment)
    assert torch.equal(inputs.x0, augment(images, draw.augment)) and not torch.equal(
        inputs.x0, images
    )
    assert inputs.refilled(inputs.tensors()).cond.vector is inputs.cond.vector


def test_held_out_losses_are_of_images_as_they_are(tiny, recipe):
    model = recipe.build().eval()
    torch.nn.init.normal_(model.out.weight)
    before = heldout_loss(recipe, model, 8)
    torch.nn.init.normal_(model.vector.weight)
    assert heldout_loss(recipe, model, 8) == before


def test_resumed_bit_for_bit_and_sampled_without(tiny, tmp_path):
    options = tiny | dict(augment=0.5)
    train(Config(**options | dict(save_folder=str(tmp_path / "whole"))))
    train(Config(**options | dict(train_steps=8)))
    train(Config(**options))
    same_runs(tmp_path / "run", tmp_path / "whole")
    pipeline = load(tmp_path / "run")
    pictures = pipeline.sample([0], steps=3, seed=1)
    assert pipeline.model.vector.weight.abs().sum() > 0  # it has learned
    pipeline.model.vector.weight.data.zero_()
    assert torch.equal(pipeline.sample([0], steps=3, seed=1), pictures)
    with pytest.raises(UserError, match="augment"):
        train(Config(**tiny | dict(train_steps=16)))


@pytest.mark.slow
def test_two_ranks_give_the_run_of_one(tiny, tmp_path):
    options = tiny | dict(augment=0.5, dropout=0.0, train_steps=2, save_and_sample_every=2)
    for ranks in (0, 2):
        folder = tmp_path / str(ranks)
        done = script(
            "train.py", *flags(options | dict(save_folder=str(folder))), cwd=tmp_path, ranks=ranks
        )
        assert done.returncode == 0, done.stderr
    one, two = (
        json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[0]) for n in "02"
    )
    assert_close(one["loss"], two["loss"], rtol=1e-5, atol=0)
    assert_close(one["grad_norm"], two["grad_norm"], rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["none", "text"])
def test_latent_models(latent, tmp_path, condition):
    options = latent | dict(augment=0.5)
    if condition == "none":
        options = plain(options, *(n for n in latent if n.startswith("text"))) | dict(
            condition="none"
        )
    train(Config(**options))
    saved = checkpoint.read(tmp_path / "run" / "model.pt")["model"]
    name = "unet.vector.weight" if condition == "text" else "vector.weight"
    assert saved[name].abs().sum() > 0
    asked = dict(prompts=["a face"]) if condition == "text" else {}
    assert load(tmp_path / "run").sample([0], steps=3, **asked).isfinite().all()


def test_not_for_stable_diffusion():
    given = dict(
        sd_path="sd", mode="latent", condition="text", augment=0.1, data="x", objective="eps"
    )
    with pytest.raises(UserError, match="--augment: no effect without .* a network from scratch"):
        resolve_config(config_from_args(given | dict(image_size=64)), set(given))
