"""Images that are not square: --image_size HEIGHTxWIDTH."""

import json

import numpy as np
import pytest
import torch
from helpers import CPU, plain, same
from PIL import Image
from torch.testing import assert_close

from diffusion import UserError, load
from diffusion.commands.train import parse
from diffusion.config import Config, size, size_text
from diffusion.data.images import to_pixels
from diffusion.files import checkpoint
from diffusion.training.dry_run import describe
from diffusion.training.recipe import open_recipe
from diffusion.training.trainer import train


def test_sizes_are_read_and_written():
    assert size("64") == size("64x64") == 64 and size("96x128") == (96, 128)
    assert size_text(64) == "64" and size(size_text((96, 128))) == (96, 128)
    config, _, _ = parse(["--image_size", "96x128"])
    assert Config.from_dict(json.loads(config.to_json())) == config
    assert config.image_size == (96, 128) and Config(image_size=8).image_size == 8
    for wrong in ((0, 8), (8, 16_385), (8,), (8, 8, 8), 0):
        with pytest.raises(UserError, match="image_size"):
            Config(image_size=wrong)


@pytest.mark.parametrize(("W", "H"), [(90, 40), (40, 90), (60, 41), (64, 48)])
def test_the_centre_is_cut_in_the_aspect_that_is_asked_for(W, H):
    rng = np.random.default_rng(W)
    image = Image.fromarray(rng.integers(256, size=(H, W, 3), dtype=np.uint8))
    for height, width in ((24, 32), (32, 24), (5, 50)):
        found = to_pixels(image, (height, width))
        w, h = min(W, round(H * width / height)), min(H, round(W * height / width))
        left, top = (W - w) // 2, (H - h) // 2
        wanted = image.crop((left, top, left + w, top + h))
        assert abs(w / h - width / height) < 0.5 / h * (1 + width / height)
        assert np.array_equal(found, np.array(wanted.resize((width, height), Image.LANCZOS)))
    assert np.array_equal(to_pixels(image, 16), to_pixels(image, (16, 16)))


def test_a_pixel_model_of_wide_images(tiny, tmp_path, capsys):
    options = tiny | dict(image_size=(12, 20), train_steps=4)
    print(describe(Config(**options), set()))
    train(Config(**options))
    pipeline = load(tmp_path / "run")
    assert pipeline.shape == (3, 12, 20)
    assert pipeline.sample([0, 1], steps=2, labels=torch.tensor([0, 1])).shape == (2, 3, 12, 20)
    # killed after two steps, and continued
    whole = checkpoint.read(tmp_path / "run" / "model.pt")["model"]
    other = options | dict(save_folder=str(tmp_path / "two"), save_and_sample_every=2)
    train(Config(**other | dict(train_steps=2)))
    train(Config(**other))
    again = checkpoint.read(tmp_path / "two" / "model.pt")["model"]
    same(whole, again)
    with pytest.raises(UserError, match="image_size"):
        train(Config(**other | dict(image_size=(20, 12))))


def test_latents_of_tall_images(tiny, tmp_path):
    options = plain(tiny, "condition", "time_steps", "sample_steps") | dict(
        image_size=(24, 16), train_steps=2
    )
    vae = str(tmp_path / "vae")
    train(Config(**options | dict(mode="vae", save_folder=vae, latent_channels=3)))
    latent = options | dict(mode="latent", vae=vae, unet_dim=16, layers_per_block=1, sample_steps=2)
    recipe = open_recipe(Config(**latent), CPU)
    assert recipe.shape(recipe.config.image_size) == (3, 12, 8)
    batch, (draw,) = recipe.batches(0, 0, 2), recipe.draw(0)
    assert recipe.inputs(batch, draw[0:2]).x0.shape == (2, 3, 12, 8)
    train(Config(**latent))
    pipeline = load(tmp_path / "run")
    assert pipeline.networks["unet"].config.sample_size == (12, 8)
    pictures = pipeline.sample([0], steps=2)
    assert pictures.shape == (1, 3, 24, 16)
    images = torch.rand(1, 3, 24, 16) * 2 - 1
    assert_close(pipeline.encode(images).shape, torch.Size((1, 3, 12, 8)))
    with pytest.raises(UserError, match="24x17.*multiple of 2"):
        train(Config(**latent | dict(image_size=(24, 17), save_folder=str(tmp_path / "odd"))))
