"""Latent mode: a VAE from scratch, diffusion in its latents, fine-tuning Stable Diffusion."""

import dataclasses
import json
import shutil
import sys
import time

import numpy as np
import pytest
import torch
import warm
from helpers import CPU, UNREAD, flags, options_of, plain, run_lines, same
from PIL import Image
from torch.testing import assert_close

from diffusion import UserError
from diffusion.commands import sample, visualize
from diffusion.commands import train as train_script
from diffusion.config import Config
from diffusion.data import toy
from diffusion.data.cache import Cache
from diffusion.data.latents import weights_digest
from diffusion.files import checkpoint
from diffusion.files.tensors import write_tensors
from diffusion.models.vae import sample as draw_latent
from diffusion.sampling.load import load, load_vae, open_pipeline, open_stack
from diffusion.training.autoencoder import AutoencoderRecipe, Images
from diffusion.training.finetune_config import resolve_config
from diffusion.training.recipe import open_recipe
from diffusion.training.trainer import train

# --- the VAE ---------------------------------------------------------------------------------------


def test_a_vae_learns_and_knows_its_scale(vae, faces):
    lines = run_lines(vae)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[-1]["heldout_loss"] < lines[0]["loss"]
    assert Image.open(vae / "samples" / "step_00000030.png").height == 2 * 18 + 2
    network = load_vae(str(vae))
    assert network.config.latent_channels == 3 and network.factor == 2
    # the latents that are diffused have deviation 1
    x = np.stack([toy.draw(i, 16) for i in range(100)])
    x = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, logvar = network.encode(x)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    z = network.scale(draw_latent(mean, logvar, noise))
    assert z.std().item() == pytest.approx(1, abs=0.15)
    for path in (vae / "model.pt", vae / "ema.safetensors"):
        same(load_vae(str(path)).state_dict(), network.state_dict())


def test_the_loss_is_its_formula(tiny):
    config = Config(**tiny | dict(mode="vae", condition="none", kl_weight=0.3, unet_dim=16))
    recipe = AutoencoderRecipe(config, CPU)
    model = recipe.build().eval()
    x, eps = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 4, 8, 8)
    decoded, mean, logvar = model(x, eps)
    z = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(z, torch.distributions.Normal(0, 1)).sum((1, 2, 3))
    expected = (x - decoded).abs().mean((1, 2, 3)) + 0.3 * kl / (3 * 16 * 16)
    assert_close(recipe.loss(model, Images(x, eps)), expected)
    assert_close(decoded, model.vae.decode(mean + (0.5 * logvar).exp() * eps))


def test_a_vae_resumes_exactly(tiny, tmp_path):
    options = plain(tiny, "time_steps", "sample_steps") | dict(
        mode="vae", condition="none", unet_dim=16
    )
    train(Config(**options))
    train(Config(**options | dict(train_steps=8, save_folder=str(tmp_path / "again"))))
    train(Config(**options | dict(save_folder=str(tmp_path / "again"))))
    a, b = (checkpoint.read(tmp_path / f / "model.pt") for f in ("run", "again"))
    same({k: a[k] for k in ("model", "ema", "optimizer")}, {k: b[k] for k in ("model", "ema", "optimizer")})  # fmt: skip
    assert run_lines(tmp_path / "run") == run_lines(tmp_path / "again")


def test_a_vae_draws_nothing_by_itself(vae):
    with pytest.raises(UserError, match="model.pt .*--mode latent --vae"):
        open_pipeline(str(vae / "model.pt"), None, "ema", CPU)


# --- what is computed once ------------------------------------------------------------------------


def numbers(folder, compute, count=4, shape=(2,), chunk=4, **options):
    return Cache(folder, count, shape, np.float16, compute, chunk, "numbers", **options)


def test_shards_are_computed_once_and_where_missing(tmp_path):
    calls = []

    def compute(indices):
        calls.extend(indices)
        return np.arange(len(indices))[:, None] + np.array([indices.start, 0.5])

    build = lambda: numbers(tmp_path / "x", compute, 25, shard=10)  # noqa: E731
    shards = build()
    assert calls == list(range(25)) and len(list((tmp_path / "x").glob("*.npy"))) == 3
    expected = np.array([[i, i % 10 % 4 + 0.5] for i in (24, 3, 11)])
    np.testing.assert_array_equal(shards[np.array([24, 3, 11])], expected)
    calls.clear()
    build()
    assert calls == []
    # a build that was cut off, or a damaged shard: only that is done again
    second = tmp_path / "x" / "00001.npy"
    second.write_bytes(second.read_bytes()[:50])
    build()
    assert calls == list(range(10, 20))


def test_non_finite_latents_are_refused(tmp_path):
    with pytest.raises(UserError, match="non-finite"):
        numbers(tmp_path, lambda i: np.full((len(i), 1), np.inf), shape=(1,))


def test_cached_latents_are_those_of_the_vae(latent, tmp_path):
    recipe = open_recipe(Config(**latent), CPU)
    batches = recipe.batches
    network, images = recipe.codec.vae, batches.pixels
    chosen = np.array([5, 77, 119])
    x = torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).float() / 127.5 - 1
    for flip, view in enumerate((x, x.flip(3))):
        mean, logvar = network.encode(view)
        cached = torch.from_numpy(batches.latents[chosen][:, flip]).float()
        assert_close(cached, torch.stack([mean, logvar], 1), rtol=2e-3, atol=2e-3)
    # a step's x0: sampled from mean and deviation, scaled; flips as in pixel mode
    step = 3
    [draw] = recipe.draw(step)
    batch = batches(step, 2, 6)
    flips = batches.flips(step)[2:6]
    indices = batches.indices(step)[2:6]
    moments = batches.latents[indices][np.arange(4), flips.astype(int)]
    mean, logvar = torch.from_numpy(moments).float().unbind(1)
    expected = network.scale(mean + (0.5 * logvar).exp() * draw.vae_eps[2:6])
    found = recipe.inputs(batch, draw[2:6])
    assert_close(found.x0, expected)
    assert_close(recipe.codec.x0(batch), network.scale(mean))  # without noise: the mean
    assert torch.equal(found.eps, draw.eps[2:6]) and torch.equal(found.levels, draw.levels[:, 2:6])
    assert flips.any() or batches.flips(step).any()


def test_another_vae_has_other_latents(vae, tmp_path):
    a = load_vae(str(vae))
    before = weights_digest(a)
    assert weights_digest(load_vae(str(vae))) == before
    with torch.no_grad():
        next(iter(a.parameters())).view(-1)[0] += 1e-3
    assert weights_digest(a) != before


def captions_of(recipe) -> list[str]:
    """The first caption of each image."""
    return recipe.batches.pixels.images.captions


def test_captions_are_dropped_for_guidance(latent):
    recipe = open_recipe(Config(**latent), CPU)
    batch = recipe.batches(0, 0, 8)
    drop = torch.tensor([True, False] * 4)
    cond = recipe.conditioning.of_batch(batch, drop)
    assert cond.labels is None
    tokenizer = recipe.conditioning.tokenizer
    captions = [captions_of(recipe)[i] for i in recipe.batches.indices(0)]
    for ids, dropped, caption in zip(cond.context, drop, captions):
        assert torch.equal(ids, tokenizer([""] if dropped else [caption])[0])


def test_noise_offset_moves_whole_channels(latent):
    recipes = (open_recipe(Config(**latent | dict(noise_offset=o)), CPU) for o in (0.0, 0.5))
    plain, moved = (recipe.draw(1)[0].eps for recipe in recipes)
    difference = moved - plain
    assert_close(difference, difference[:, :, :1, :1].expand_as(difference))
    assert 0.2 < difference.std() < 1


# --- training and sampling ------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["none", "class", "text"])
def test_from_scratch(latent, tmp_path, condition):
    options = latent | ({} if condition == "text" else UNREAD)
    options |= dict(condition=condition, guidance_scale=1.0 if condition == "none" else 2.0)
    train(Config(**options))
    assert (tmp_path / "run" / "samples" / "step_00000012.png").exists()
    lines = run_lines(tmp_path / "run")
    assert all(np.isfinite(line["loss"]) for line in lines) and "heldout_loss" in lines[-1]
    pipeline = open_pipeline(str(tmp_path / "run" / "model.pt"), None, "ema", CPU)
    options = {"text": {"prompts": ["bald", "red hair"], "guidance_scale": 2.0}, "none": {},
            "class": {"labels": torch.tensor([0, 2]), "guidance_scale": 2.0}}[condition]  # fmt: skip
    a = pipeline.sample(range(2), steps=4, amp="no", **options)
    assert a.shape == (2, 3, 16, 16)
    again = pipeline.sample([1], steps=4, amp="no", **{k: v[1:] if k != "guidance_scale" else v for k, v in options.items()})  # fmt: skip
    assert_close(a[1:], again, atol=2 / 127.5, rtol=0)
    if condition == "class":
        shown = pipeline.sample(
            range(2), steps=4, amp="no", **options | {"labels": torch.tensor([2, 0])}
        )
        assert (shown - a).abs().amax((1, 2, 3)).min() > 1e-3
    if condition == "text":
        other = pipeline.sample(range(2), steps=4, amp="no", prompts=["x", "y"], guidance_scale=2.0)
        assert not torch.equal(a, other)


@pytest.mark.slow
def test_kill_and_resume_is_exact(latent, tmp_path):
    """kill -9 while it trains; the continued run is the run that was never stopped."""
    straight = latent | dict(save_folder=str(tmp_path / "straight"))
    assert warm.script("train.py", *flags(straight), cwd=tmp_path).returncode == 0
    run = warm.Process("train.py", *flags(latent | dict(train_steps=500)), cwd=tmp_path)
    while not (tmp_path / "run" / "checkpoints" / "step_00000004.pt").exists():
        time.sleep(0.02)
        assert run.poll() is None
    run.kill()
    run.wait()
    newest = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))[-1]
    if int(newest.stem[5:]) > 12:
        pytest.skip("the machine was too fast for this test")
    assert warm.script("train.py", *flags(latent), cwd=tmp_path).returncode == 0
    a, b = (checkpoint.read(tmp_path / f / "model.pt") for f in ("run", "straight"))
    keys = ("model", "ema", "optimizer", "tally")
    same({k: a[k] for k in keys}, {k: b[k] for k in keys})
    assert run_lines(tmp_path / "run") == run_lines(tmp_path / "straight")


def test_two_ranks_share_the_encoding(latent, tmp_path):
    done = warm.script("train.py", *flags(latent), cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    train(Config(**latent | dict(save_folder=str(tmp_path / "one"))))
    a, b = (run_lines(tmp_path / f) for f in ("run", "one"))
    assert_close([x["loss"] for x in a], [x["loss"] for x in b], rtol=1e-3, atol=1e-4)


def test_validation_prompts(latent, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("bald\n\nred hair\n")
    recipe = open_recipe(Config(**latent | dict(validation_prompts=str(file))), CPU)
    assert recipe.prompts == ["bald", "red hair"]
    for content in (None, "\n"):
        file.unlink(missing_ok=True)
        if content:
            file.write_text(content)
        with pytest.raises(UserError, match="prompts.txt"):
            open_recipe(Config(**latent | dict(validation_prompts=str(file))), CPU)


def test_fine_tuning_stable_diffusion(latent, sd_folder, tmp_path):
    """It starts from the model itself, trains the U-Net only, and samples with its parts."""
    options = latent | options_of(sd_folder) | dict(train_steps=4, learning_rate=1e-3)
    train(Config(**options))
    before = open_pipeline(None, sd_folder, "ema", CPU, amp="no")
    after = open_pipeline(str(tmp_path / "run" / "model.pt"), None, "raw", CPU)
    assert before.model.state_dict().keys() == after.model.state_dict().keys()
    name = "conv_in.weight"
    difference = after.model.state_dict()[name] - before.model.state_dict()[name]
    assert 0 < difference.abs().max() < 0.01
    eps = torch.randn(1, *after.shape)
    images = [p.sample([0], steps=3, eps=eps, prompts=["a fox"], guidance_scale=2.0, amp="no")
              for p in (before, after)]  # fmt: skip
    assert images[0].shape == (1, 3, 32, 32) and not torch.allclose(*images, atol=1e-4)
    # the cached embeddings are the text encoder's
    recipe = open_recipe(Config(**options), CPU)
    batch = recipe.batches(0, 0, 2)
    captions = [captions_of(recipe)[i] for i in recipe.batches.indices(0)[:2]]
    expected = before.conditioning.embed(captions)
    assert_close(batch.text.float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_export_for_other_programs(latent, sd_folder, tmp_path, monkeypatch):
    """diffusers draws from the exported folder what we draw from our checkpoint."""
    import diffusers

    from diffusion.files import sd_export as export

    train(Config(**latent | options_of(sd_folder) | dict(train_steps=4, learning_rate=1e-3)))
    model = str(tmp_path / "run" / "model.pt")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["export", *map(str, args)])
        export.main()

    run(model, tmp_path / "folder")
    run(model, tmp_path / "file.safetensors", "--dtype", "fp16")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "folder", safety_checker=None
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    ours, eps = open_pipeline(model, None, "ema", CPU), torch.randn(1, 4, 16, 16)
    expected = theirs(
        ["a fox"], latents=eps, num_inference_steps=3, output_type="latent", guidance_scale=3.0
    )
    *_, (found, _) = ours.frames([0], eps=eps, sampler="ddim", steps=3, prompts=["a fox"], guidance_scale=3.0, amp="no")  # fmt: skip
    assert_close(found, expected.images, rtol=1e-4, atol=1e-4)
    half = open_pipeline(None, str(tmp_path / "file.safetensors"), "ema", CPU, config=sd_folder, amp="no")  # fmt: skip
    *_, (again, _) = half.frames([0], eps=eps, sampler="ddim", steps=3, prompts=["a fox"], guidance_scale=3.0, amp="no")  # fmt: skip
    assert (again - found).abs().mean() < 0.05
    with pytest.raises(UserError, match=str(tmp_path / "folder")):
        run(model, tmp_path / "folder")
    train(Config(**latent | dict(train_steps=2, save_folder=str(tmp_path / "scratch"))))
    with pytest.raises(UserError, match="model.pt .*Stable Diffusion"):
        run(tmp_path / "scratch" / "model.pt", tmp_path / "x")


@pytest.mark.parametrize("kind", ["scratch", pytest.param("sd", marks=pytest.mark.slow)])
def test_streaming_is_encoded_as_it_comes_and_resumes(
    latent,
    sd_folder,
    tmp_path,
    monkeypatch,
    kind,
    parquet,
):
    from diffusion.data.stream import StreamBatches

    monkeypatch.setattr(StreamBatches, "BLOCK", 16)
    monkeypatch.setattr(StreamBatches, "HELD_OUT", 20)
    options = latent | (options_of(sd_folder) if kind == "sd" else {})
    options |= dict(data=f"hf:{parquet[0]}", streaming=True)
    train(Config(**options))
    train(Config(**options | dict(train_steps=8, save_folder=str(tmp_path / "again"))))
    train(Config(**options | dict(save_folder=str(tmp_path / "again"))))
    a, b = (checkpoint.read(tmp_path / f / "model.pt") for f in ("run", "again"))
    same({k: a[k] for k in ("model", "optimizer")}, {k: b[k] for k in ("model", "optimizer")})
    recipe = open_recipe(Config(**options), CPU)
    batch, [draw] = recipe.batches(0, 0, 4), recipe.draw(0)
    assert len(batch.captions) == 4 and all(batch.captions)
    cond = recipe.conditioning.of_batch(batch, torch.tensor([True, False, False, True]))
    expected = recipe.conditioning.encode(["", batch.captions[1], batch.captions[2], ""])
    assert_close(cond.context.float(), expected.float())
    assert recipe.codec.x0(batch, draw.vae_eps[:4]).shape[0] == 4


def test_a_model_that_has_moved(latent, vae, tmp_path):
    shutil.copytree(vae, tmp_path / "vae")
    train(Config(**latent | dict(vae=str(tmp_path / "vae"), train_steps=2)))
    (tmp_path / "vae").rename(tmp_path / "moved")
    model = tmp_path / "run" / "model.pt"
    with pytest.raises(UserError, match=f"{tmp_path / 'vae'} .*--vae"):
        load(model)
    assert load(model, vae=str(tmp_path / "moved")).shape == (3, 8, 8)
    with pytest.raises(UserError, match="--clip_skip"):
        load(model, clip_skip=2)


def test_another_vae_for_a_fine_tuned_model(latent, sd_folder, tmp_path):
    train(Config(**latent | options_of(sd_folder) | dict(train_steps=2)))
    model = tmp_path / "run" / "model.pt"
    made = open_pipeline(str(model), None, "ema", CPU, vae=sd_folder, clip_skip=2)
    same(made.codec.vae.state_dict(), load(model).codec.vae.state_dict())
    assert made.conditioning.skip == made.clip_skip == 2 and load(model).clip_skip is None
    with pytest.raises(UserError, match="nowhere.*--sd_path"):
        open_pipeline(str(model), str(tmp_path / "nowhere"), "ema", CPU)


def test_perceptual_loss_says_where_its_weights_are_missing(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    with pytest.raises(UserError, match="(?i)lpips"):
        AutoencoderRecipe(
            Config(**tiny | dict(mode="vae", condition="none", perceptual_weight=0.1)), CPU
        )


def test_mistakes(latent, tiny, tmp_path, sd_folder):
    for change, named in (
        (dict(vae=None), "--sd_path.*--vae"),
        (dict(vae=str(tmp_path / "none")), str(tmp_path / "none")),
        (dict(image_size=17), "image_size 17 .* 2"),
        (dict(text_encoder="clip"), "--text_encoder scratch"),
    ):
        with pytest.raises(UserError, match=named):
            train(Config(**latent | change))
    for change, named in (
        (dict(mode="pixel", condition="text"), "--mode latent"),
        (dict(mode="vae", condition="class"), "--condition"),
        (dict(mode="latent", sd_path="a", vae="b", condition="text"), "--sd_path.*--vae"),
        (dict(mode="latent", sd_path=sd_folder, condition="none"), "--condition text"),
    ):
        with pytest.raises(UserError, match=named):
            resolve_config(Config(**tiny | change), set(change))
    plain = tmp_path / "plain"
    plain.mkdir()
    for i in range(4):
        Image.fromarray(toy.draw(i, 16)).save(plain / f"{i}.png")
    with pytest.raises(UserError, match=f"{plain} .*--default_caption"):
        train(Config(**latent | dict(data=str(plain))))
    (plain / "0.txt").write_bytes("a caf\xe9".encode("latin-1"))
    (plain / "1.txt").write_text("")
    recipe = open_recipe(Config(**latent | dict(data=str(plain), batch_size=2)), CPU)
    assert captions_of(recipe)[0] == "a café"


# --- sample.py ------------------------------------------------------------------------------------


def test_sample_with_prompts(sd_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox, sitting\ntwo cats\n")
    done = warm.script("sample.py", "--sd_path", sd_folder, "--prompt", f"@{prompts}", "--prompt", "a dog",
                  "--negative_prompt", "blurry", "--steps", 3, "--sampler", "dpmpp_2m", "--amp", "no",
                  "--device", "cpu", "--save_folder", tmp_path / "s", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    pictures = [Image.open(tmp_path / "s" / "images" / f"{i:06d}.png") for i in range(3)]
    text = pictures[0].text["parameters"]
    assert text.splitlines()[0] == "a red fox, sitting"
    assert text.splitlines()[1] == "Negative prompt: blurry"
    assert "Steps: 3, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 0" in text.splitlines()[2]
    assert pictures[2].text["parameters"].startswith("a dog\n") and pictures[0].size == (32, 32)


def test_image_to_image_and_inpainting(sd_folder, tmp_path, monkeypatch):
    from diffusion.commands import sample
    from diffusion.sampling.init_image import read_init_image

    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.fromarray(toy.draw(3, 64)).save(photo)
    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 255
    Image.fromarray(half).save(mask)

    def run(name, *args) -> np.ndarray:
        monkeypatch.setattr(sys, "argv", ["sample.py", "--sd_path", sd_folder, "--prompt", "x", "--steps", "10",
                            "--amp", "no", "--device", "cpu", "--save_folder", str(tmp_path / name), *map(str, args)])  # fmt: skip
        sample.main()
        return np.asarray(Image.open(tmp_path / name / "images" / "000000.png")).astype(int)

    whole = run("a", "--init_image", photo, "--strength", 0.3)
    pipeline = open_pipeline(None, sd_folder, "ema", CPU, amp="no")
    start = read_init_image(pipeline, str(photo), str(mask))
    assert start["init"].shape == (1, 4, 16, 16) and start["mask"].mean() == 0.5
    table = pipeline.table("ddim", 10, strength=0.3)
    assert len(table) == 3
    painted = run("b", "--init_image", photo, "--mask", mask, "--strength", 0.3)
    assert abs(painted - whole)[:, :8].mean() > 1  # far from what is painted: the image itself
    # in latents, the half that stays is the image's
    x = pipeline.frames([0], steps=10, prompts=["x"], amp="no", **start)
    *_, (last, _) = x
    assert_close(last[..., :8], start["init"][..., :8], rtol=1e-3, atol=1e-4)
    assert (last[..., 8:] - start["init"][..., 8:]).abs().mean() > 0.1
    for args, named in (
        (("--mask", mask), "--mask.*--init_image"),
        (("--init_image", tmp_path / "none.png"), "none.png"),
        (("--init_image", photo, "--strength", 0.01), "strength"),
        (("--height", 33), "height is 33.* 2"),
        (("--clip_skip", 9), "clip_skip is 9"),
        (("--class_label", "cat"), "class_label"),
        (("--prompt", "@none.txt"), "none.txt"),
    ):
        with pytest.raises(UserError, match=named):
            run("c", *args)
    assert not (tmp_path / "c").exists()


def test_long_prompts_are_read_in_chunks(sd_folder):
    pipeline = open_pipeline(None, sd_folder, "ema", CPU, amp="no")
    long = "a very long prompt " * 12
    n = pipeline.conditioning.read([long], None, True)[0]
    assert n > 2 and pipeline.conditioning.embed([long, ""], n).shape == (2, n * 75 + 2, 32)
    a, b = (pipeline.sample([0], steps=2, prompts=[p], guidance_scale=3.0, amp="no") for p in (long, long[:60]))  # fmt: skip
    assert not torch.allclose(a, b, atol=1e-4)


def test_clip_skip_and_tiling_change_the_picture_as_they_should(sd_folder, monkeypatch):
    eps = torch.randn(1, 4, 16, 16)
    options = dict(steps=2, eps=eps, prompts=["x"], guidance_scale=3.0, amp="no")
    make = lambda **o: open_pipeline(None, sd_folder, "ema", CPU, amp="no", **o).sample(
        [0], **options
    )  # noqa: E731
    plain = make()
    assert not torch.allclose(make(clip_skip=2), plain, atol=1e-5)
    assert_close(make(vae_tiling=True), plain)  # smaller than one tile
    monkeypatch.setattr("diffusion.sampling.load.TILE", 8)
    tiles = make(vae_tiling=True)
    assert 0 < (tiles - plain).abs().mean() < 0.5 * plain.std()


def test_models_given_by_the_wrong_option(model, sd_folder, tmp_path):
    """Each says which is the right one; the folder of a run stands for its model."""
    write_tensors(tmp_path / "adapter.safetensors", {"a": torch.zeros(1)}, {"format": "pt"})
    for where, named in (
        ((None, str(model)), "--load_path"),
        ((None, str(model.parent)), "--load_path"),
        ((sd_folder, None), "--sd_path"),
        ((str(tmp_path / "adapter.safetensors"), None), "--lora"),
    ):
        with pytest.raises(UserError, match=named):
            open_pipeline(*where, None, CPU)
    with pytest.raises(UserError, match="--load_path"):
        resolve_config(Config(mode="latent", condition="text", sd_path=str(model.parent)))
    with pytest.raises(UserError, match="--vae"):
        open_stack(Config(mode="latent", vae=str(tmp_path)), CPU)
    for command in (sample, visualize):
        assert command.parse(["--load_path", str(model.parent)]).load_path == str(model)
    assert train_script.parse(["--load_path", str(model.parent)])[0].load_path == str(model)


def test_a_pixel_model_has_no_use_for_prompts(model, sd_folder):
    for option in (dict(height=8), dict(clip_skip=2), dict(vae="x")):
        [name] = option
        with pytest.raises(UserError, match=f"--{name}.*model.pt"):
            open_pipeline(str(model), None, "ema", CPU, **option)
    pipeline = open_pipeline(str(model), None, "ema", CPU)
    with pytest.raises(UserError, match="prompt"):
        pipeline.sample([0], prompts=["x"], steps=2)


def test_bfloat16_is_close(sd_folder):
    eps = torch.randn(1, 4, 16, 16)
    options = dict(steps=3, eps=eps, prompts=["x"], guidance_scale=2.0)
    full = open_pipeline(None, sd_folder, "ema", CPU, amp="no").sample([0], amp="no", **options)
    half = open_pipeline(None, sd_folder, "ema", CPU, amp="bf16")
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert (half.sample([0], amp="bf16", **options) - full).abs().mean() < 0.01


@pytest.mark.slow
def test_visualize_takes_latent_models(latent, tmp_path, monkeypatch):
    from diffusion.commands import visualize

    train(Config(**latent))
    model = tmp_path / "run" / "model.pt"
    monkeypatch.setattr(sys, "argv", ["visualize.py", "--load_path", str(model), "--steps", "4", "--html",
                                      "--num_images", "2", "--save_folder", str(tmp_path), "--device", "cpu"])  # fmt: skip
    visualize.main()
    text = (tmp_path / "viz" / "index.html").read_text()
    data = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    assert data["size"] == [16, 16] and len(data["runs"]) == 6


def test_presets_are_whole():
    from diffusion.config import PRESETS, config_from_args

    for name in ("sd_tiny", "sd_tiny_vae"):
        config = config_from_args({}, name)
        assert dataclasses.asdict(config)["mode"] == PRESETS[name]["mode"]
    made = config_from_args({"sd_path": "x", "data": "y"}, "anime_sd15")
    assert (made.learning_rate, made.batch_size, made.train_steps) == (1e-4, 128, 50_000)
    assert (made.ema_decay, made.amp, made.keep_last, made.image_size) == (0.9995, "auto", 3, 512)


def test_damaged_latents_are_not_trained_on(tmp_path, capsys):
    """They have a digest, are named and made again; files of before there was one, too."""
    make = lambda: numbers(tmp_path, lambda i: np.ones((len(i), 2)))  # noqa: E731
    assert make()[np.arange(4)].tolist() == [[1, 1]] * 4
    data = np.ones((4, 2), np.float16)
    data[2, 1] = np.nan
    np.save(tmp_path / "00000.npy", data)
    assert make()[np.arange(4)].tolist() == [[1, 1]] * 4
    assert str(tmp_path) in capsys.readouterr().out


# --- what a run is known by ------------------------------------------------------------------------


def test_data_is_known_by_its_names(tiny, faces, tmp_path, monkeypatch, capsys):
    """Not by the spelling of its path; other names are refused, a wrong path is said first."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(faces / "bald", "faces", ignore=lambda _, names: sorted(names)[16:])
    options = tiny | dict(data="faces", train_steps=1, num_samples=0, condition="none")
    train(Config(**options))
    moved = shutil.copytree("faces", tmp_path / "other" / "moved")
    for steps, data in enumerate(("faces/", str(tmp_path / "faces"), str(moved)), 2):
        train(Config(**options | dict(data=data, train_steps=steps)))
        assert checkpoint.read(tmp_path / "run" / "model.pt")["step"] == steps
    with pytest.raises(UserError, match="facse"):  # before the other difference
        train(Config(**options | dict(data="facse", learning_rate=0.1)))
    (moved / "000.png").rename(moved / "other.png")
    with pytest.raises(UserError, match=f"--data {moved}/ .*--load_path .*model.pt"):
        train(Config(**options | dict(data=f"{moved}/", train_steps=9)))


def test_the_start_is_known_by_its_weights(tiny, tmp_path, monkeypatch):
    first = tiny | dict(train_steps=1, save_folder="a", num_samples=0)
    monkeypatch.chdir(tmp_path)
    for folder, seed in (("a", 0), ("b", 1)):
        train(Config(**first | dict(save_folder=folder, seed=seed)))
    options = tiny | dict(load_path="a/model.pt", train_steps=2, num_samples=0)
    train(Config(**options))
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    for steps, path in enumerate((tmp_path / "a" / "model.pt", "c/ema.safetensors"), 3):
        train(Config(**options | dict(load_path=str(path), train_steps=steps)))
    assert checkpoint.read(tmp_path / "run" / "model.pt")["step"] == 4
    for other in ("b/model.pt", str(tmp_path / "b" / "model.pt"), None):
        with pytest.raises(UserError, match="load_path: .*given"):
            train(Config(**options | dict(load_path=other, train_steps=9)))


def test_a_model_finds_its_vae_and_names_no_place(latent, vae, tmp_path, monkeypatch):
    """From any folder, by a relative path, an absolute one or beside it; no file says which."""
    options = latent | dict(condition="none", train_steps=1, **UNREAD)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(vae, "results/vae")
    shutil.copytree(vae, "elsewhere/model")  # the last name is that of no folder beside the run
    train(Config(**options | dict(vae="results/vae", save_folder="results/run")))
    where = str(tmp_path / "elsewhere" / "model")
    train(Config(**options | dict(vae=where, save_folder=str(tmp_path / "far" / "run"))))
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    train(Config(**options | dict(vae=where, save_folder=str(tmp_path / "far" / "again"))))
    found = load(tmp_path / "far" / "again" / "ema.safetensors")
    assert found.config.vae == where and found.sample([0], steps=2).isfinite().all()
    for file in (tmp_path / "far" / "again").rglob("*"):
        if file.is_file() and file.name != "config.json":  # which is private
            assert str(tmp_path).encode() not in file.read_bytes(), file
    # shared without it: what lies beside the model is found, else it is asked for
    for folder in ("far/again", "results/run"):
        (tmp_path / folder / "config.json").unlink()
    found = load(tmp_path / "results" / "run" / "model.pt")
    assert found.config.vae == str(tmp_path / "results" / "vae")
    with pytest.raises(UserError, match="--vae"):
        load(tmp_path / "far" / "again" / "model.pt")
    load(tmp_path / "far" / "again" / "model.pt", vae=where)


EDITS = {
    "scheduler configuration": ("scheduler/scheduler_config.json", '"beta_end": 0.012', '"beta_end": 0.02'),
    "U-Net configuration": ("unet/config.json", '"sample_size": 16', '"sample_size": 32'),
    "text encoder configuration": ("text_encoder/config.json", '"quick_gelu"', '"gelu"'),
    "tokenizer": ("tokenizer/tokenizer_config.json", '"model_max_length": 77', '"model_max_length": 40'),
}  # fmt: skip


def test_changed_settings_of_the_base_are_noticed(latent, sd_folder, tmp_path):
    """Though all weights are the same; the base itself may have moved."""
    options = latent | options_of(sd_folder) | dict(adapter="lora", rank=2, num_samples=0)
    options |= dict(train_steps=1)
    train(Config(**options))
    moved = shutil.copytree(sd_folder, tmp_path / "moved")
    train(Config(**options | dict(sd_path=f"{moved}/", train_steps=2)))
    for name, (file, old, new) in EDITS.items():
        text = (moved / file).read_text()
        assert old in text, (file, text)
        (moved / file).write_text(text.replace(old, new))
        with pytest.raises(UserError, match=rf"{tmp_path / 'run'} .*another {name} than"):
            train(Config(**options | dict(sd_path=str(moved), train_steps=3)))
        (moved / file).write_text(text)
    train(Config(**options | dict(sd_path=str(moved), train_steps=3)))
    # checkpoints of before say nothing of these settings
    for path in (tmp_path / "run").rglob("*.pt"):
        state = checkpoint.read(path)
        state["frozen"] = {k: state["frozen"][k] for k in ("VAE", "VAE's scale", "text encoder")}
        state.pop("origin")
        path.unlink()
        torch.save(state, path)
    train(Config(**options | dict(sd_path=str(moved), train_steps=4)))
