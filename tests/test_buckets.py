"""Aspect-ratio buckets: --aspect_buckets."""

import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script
from helpers import CPU, flags, plain, run_lines, same_runs, tiny_run
from PIL import Image

from diffusion import UserError, load
from diffusion.config import Config
from diffusion.data.buckets import bucket_sizes, nearest
from diffusion.data.images import read_image
from diffusion.training.recipe import open_recipe
from diffusion.training.trainer import train


def test_sizes_have_about_the_area():
    assert bucket_sizes(512, 8) == [
        (512, 512), (448, 576), (576, 448), (384, 640), (640, 384), (320, 768), (768, 320)
    ]  # fmt: skip
    for size, factor in ((16, 2), (64, 4), (96, 8), (768, 8), ((512, 768), 8), ((24, 16), 2)):
        sizes = bucket_sizes(size, factor)
        area = math.prod(sizes[0])
        assert len(set(sizes)) == len(sizes) and sizes[0] == (
            size if type(size) is tuple else (size, size)
        )
        assert len(sizes) > 2
        for height, width in sizes:
            assert height % factor == width % factor == 0
            assert 0.75 * area <= height * width <= area
            assert (width, height) in sizes or (height, width) == size


def test_images_go_where_least_is_cut():
    sizes = bucket_sizes(512, 8)
    shapes = np.array([(100, 100), (1000, 1280), (1280, 1000), (10, 400), (640, 384), (99, 110)])
    assert [sizes[k] for k in nearest(shapes, sizes)] == [
        (512, 512), (448, 576), (576, 448), (320, 768), (640, 384), (512, 512)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> dict:
    """The options of a latent run on 40 images: 20 square, 12 wide, 7 tall and a damaged one."""
    root = tmp_path_factory.mktemp("buckets")
    folder = root / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(39):
        width, height = (32, 32) if i < 20 else (60, 36) if i < 32 else (24, 40)
        pixels = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"number {i}")
    (folder / "39.png").write_bytes(b"\x89PNG\r\n\x1a\n, and no more")
    options = plain(tiny_run(folder, root), "time_steps", "condition")
    vae = options | dict(
        mode="vae", latent_channels=3, train_steps=2, save_folder=str(root / "vae")
    )
    train(Config(**plain(vae, "sample_steps")))
    return options | dict(
        mode="latent", vae=str(root / "vae"), aspect_buckets=True, unet_dim=16, layers_per_block=1,
        train_steps=16, save_and_sample_every=4, time_steps=20, save_folder=str(root / "run"),
        condition="text", text_encoder="scratch", text_length=16, text_dim=16, text_layers=1,
    )  # fmt: skip


@pytest.mark.parametrize("cache", [True, False])
def test_a_batch_is_of_one_size(wide, cache):
    recipe = open_recipe(Config(**wide, cache=cache), CPU)
    batches = recipe.batches
    assert len(batches) == 39 and batches.held_out.size == 0
    sizes = Counter(batches.sizes[k] for k in batches.bucket_of)
    assert sizes == {(16, 16): 20, (12, 20): 12, (20, 12): 7}
    seen = Counter()
    for step in range(20):
        chosen = batches.indices(step)
        size = batches.size_at(step)
        assert {batches.sizes[k] for k in batches.bucket_of[chosen]} == {size}
        seen[size] += 1
        assert recipe.draw(step)[0].eps.shape == (8, 3, size[0] // 2, size[1] // 2)
        assert batches(step, 2, 5).moments.shape[-2:] == (size[0] // 2, size[1] // 2)
    assert seen.keys() == sizes.keys()


@pytest.mark.parametrize("batch_size", [8, 64])
def test_images_are_seen_equally_often(wide, batch_size):
    """Also the only one of its size, and where a batch is more than the images."""
    folder = Path(wide["data"]).parent / "rare"
    if not folder.exists():
        folder.mkdir()
        for i in range(41):
            size = (32, 32) if i < 30 else (60, 36) if i < 40 else (20, 60)
            Image.new("RGB", size, (i, 0, 0)).save(folder / f"{i:02d}.png")
    options = plain(wide, "text_encoder", "text_length", "text_dim", "text_layers")
    options |= dict(condition="none", data=str(folder), batch_size=batch_size)
    batches = open_recipe(Config(**options), CPU).batches
    steps = 41 * 24
    seen = np.bincount(np.concatenate([batches.indices(s) for s in range(steps)]), minlength=41)
    share = steps * batch_size / 41
    assert (abs(seen / share - 1) < 0.15).all()
    if batch_size == 8:  # an epoch repeats no image before it has had all of its bucket
        for epoch in range(9):
            chosen = np.concatenate([batches.indices(5 * epoch + place) for place in range(5)])
            for k in np.unique(batches.bucket_of[chosen]):
                counts = Counter(chosen[batches.bucket_of[chosen] == k])
                size = (batches.bucket_of == k).sum()
                assert max(counts.values()) == math.ceil(sum(counts.values()) / size)
    orders = [tuple(map(batches.size_at, range(5 * e, 5 * e + 5))) for e in range(8)]
    assert len(set(orders)) > 2


def test_damaged_images_are_named(wide, tmp_path, capsys):
    options = wide | dict(cache_dir=str(tmp_path))
    open_recipe(Config(**options), CPU)
    assert "'39.png' is skipped" in capsys.readouterr().out


def test_latents_are_those_of_the_whole_image(wide):
    recipe = open_recipe(Config(**wide), CPU)
    batches = recipe.batches
    for step in range(5):
        chosen, flips = batches.indices(step)[:3], batches.flips(step)
        batch = batches(step, 0, 3)
        for i, moments, text, flip in zip(chosen, batch.moments, batch.text, flips):
            file = Path(wide["data"]) / Path(batches.pixels.images.names[i]).name
            image = torch.from_numpy(read_image(file, batches.size_at(step))).permute(2, 0, 1)
            image = image.flip(2) if flip else image
            mean, logvar = recipe.codec.moments(image[None] / 127.5 - 1)
            torch.testing.assert_close(
                moments, torch.cat([mean, logvar]).half(), atol=2e-3, rtol=2e-3
            )
            ids = recipe.stack.prompts.tokenizer.encode(f"number {int(file.stem)}")
            assert text.tolist()[1 : 1 + len(ids)] == ids


def test_killed_and_resumed(wide, tmp_path):
    """Also with micro-batches: the batches are a function of the step."""
    whole = wide | dict(save_folder=str(tmp_path / "whole"))
    train(Config(**whole))
    parts = wide | dict(save_folder=str(tmp_path / "parts"))
    train(Config(**parts | dict(train_steps=8)))
    train(Config(**parts))
    same_runs(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(UserError, match="aspect_buckets"):
        train(Config(**parts | dict(aspect_buckets=False, train_steps=18)))
    moved = tmp_path / "moved"
    shutil.copytree(wide["data"], moved)
    (moved / "39.png").unlink()
    train(Config(**parts | dict(data=str(moved), train_steps=18)))  # images of the same names
    pipeline = load(tmp_path / "parts")
    pipeline.set_size(12, 20)
    assert pipeline.sample([0], steps=2, prompts=["number 3"]).shape == (1, 3, 12, 20)


@pytest.mark.slow
def test_two_ranks_step_as_one(wide, tmp_path):
    found = []
    for ranks in (0, 2):
        options = wide | dict(save_folder=str(tmp_path / f"{ranks}"), train_steps=6, num_samples=0)
        done = script("train.py", *flags(options), cwd=tmp_path, ranks=ranks)
        assert done.returncode == 0, done.stderr
        lines = run_lines(tmp_path / f"{ranks}")
        found.append([line["loss"] for line in lines if "loss" in line])
    assert len(found[0]) == 3
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), atol=0, rtol=1e-4)


def test_held_out_images_have_the_first_size(wide, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(110):
        Image.new("RGB", (60, 36) if i % 2 else (32, 32), (2 * i, i, 0)).save(folder / f"{i}.png")
    options = plain(wide, "text_encoder", "text_length", "text_dim", "text_layers")
    options |= dict(condition="none", data=str(folder), save_folder=str(tmp_path / "run"))
    config = Config(**options | dict(train_steps=4))
    batches = open_recipe(config, CPU).batches
    assert len(batches.held_out) == 2 and len(batches) == 108
    assert batches.held_out_batch(0, 2).moments.shape[-2:] == (8, 8)
    assert not set(batches.held_out) & {i for s in range(30) for i in batches.indices(s)}
    counts = Counter(batches.sizes[k] for k in batches.bucket_of[batches.train])
    for (height, width), count in counts.items():
        assert f"{height}x{width} ({count})" in batches.describe()
    train(config)


@pytest.mark.parametrize(
    "options",
    [
        dict(mode="pixel"),
        dict(mode="latent", data="toy"),
        dict(mode="latent", streaming=True, data="hf:a/b"),
        dict(mode="latent", condition="text", instance_prompt="a", class_prompt="b"),
    ],
)
def test_what_has_no_buckets(options):
    with pytest.raises(UserError, match="aspect_buckets"):
        Config(**options, aspect_buckets=True).check_use({*options, "aspect_buckets"})
