"""Latent models: conditioning, what a checkpoint leaves out, and which options have a use."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, INVERSION, LORA, UNREAD, on_scratch, on_sd, options_of, plain
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from diffusion import UserError
from diffusion.config import PRESETS, Config, config_from_args
from diffusion.data import toy
from diffusion.files import checkpoint
from diffusion.files import sd_export as export
from diffusion.files import sd_files as loader
from diffusion.files.validate import digest_tensors
from diffusion.models.build import vae_config
from diffusion.models.sd_blocks import Attention
from diffusion.sampling.load import build_network, load_vae, open_pipeline, open_stack
from diffusion.training.autoencoder import KLAutoencoder
from diffusion.training.dry_run import forward_cost
from diffusion.training.finetune_config import open_base, resolve_config
from diffusion.training.recipe import open_recipe
from diffusion.training.trainer import train

# --- labels ---------------------------------------------------------------------------------------


def test_classes_are_learnt_and_drawn(latent, tmp_path):
    options = (
        latent
        | UNREAD
        | dict(condition="class", learning_rate=1e-2, train_steps=20, condition_dropout=0.5)
    )
    recipe = open_recipe(Config(**options), CPU)
    network = recipe.build()
    for p in network.parameters():  # a new network's output is zero
        torch.nn.init.normal_(p, std=0.05)
    batch, [draw] = recipe.batches(0, 0, 8), recipe.draw(0)
    recipe.loss(network, recipe.inputs_of(0, batch, [draw], 0, 8)).mean().backward()
    moved = network.class_embedding.weight.grad.abs().amax(1) > 0
    labels = batch.labels.masked_fill(draw.drop, 3).unique()
    assert moved.nonzero().flatten().tolist() == labels.tolist() and len(labels) > 1
    train(Config(**options))
    pipeline = open_pipeline(str(tmp_path / "run" / "model.pt"), None, "raw", CPU)
    eps = torch.randn(1, *pipeline.shape)
    draw = lambda label, scale=2.0: pipeline.sample(
        [0], steps=4, eps=eps, amp="no", guidance_scale=scale, labels=torch.tensor([label])
    )
    assert (draw(0) - draw(1)).abs().max() > 1e-3
    assert (draw(0) - draw(0, 1.0)).abs().max() > 1e-3


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["none", "class", "text"])
def test_heads_have_about_32_channels(latent, condition):
    config = Config(**latent | dict(condition=condition, unet_dim=64, dim_mults=(1, 2, 4)))
    network = build_network(config, 3, open_stack(config, CPU))
    found = [
        (m.heads, m.to_q.weight.shape[0]) for m in network.modules() if isinstance(m, Attention)
    ]
    assert {dim for _, dim in found} == {128, 256}
    assert all(dim == 32 * heads for heads, dim in found)


def test_odd_widths(latent):
    for condition in ("none", "text"):
        config = Config(
            **latent | dict(condition=condition, unet_dim=50, dim_mults=(1, 2), text_dim=100)
        )
        build_network(config, 0, open_stack(config, CPU))
    for dim in (66, 70, 130):
        network = KLAutoencoder(vae_config(dim, (1, 2), latent_channels=4, sample_size=8))
        x = torch.zeros(1, 3, 8, 8)
        assert network(x, torch.zeros(1, 4, 4, 4))[0].shape == x.shape


# --- what is not in the checkpoint ------------------------------------------------------------------


def shift(path) -> None:
    """Other weights under the same path."""
    tensors = load_file(path)
    with torch.no_grad():
        tensors = {k: v + 0.01 for k, v in tensors.items()}
    with safe_open(path, "pt") as file:
        about = file.metadata()
    if "sha256" in about:
        about["sha256"] = digest_tensors(tensors)
    save_file(tensors, path, metadata=about)


@pytest.mark.slow
def test_another_vae_under_the_same_path(latent, vae, tmp_path, capfd):
    shutil.copytree(vae, tmp_path / "vae")
    options = latent | dict(vae=str(tmp_path / "vae"), train_steps=4, text_length=128)
    train(Config(**options))
    run, moved = tmp_path / "run" / "model.pt", tmp_path / "moved"
    weights = checkpoint.load_weights(tmp_path / "run" / "ema.safetensors")[2]
    assert weights["frozen"] == checkpoint.load_weights(run)[2]["frozen"]
    (tmp_path / "vae").rename(moved)
    options |= dict(vae=str(moved))
    train(Config(**options | dict(train_steps=6)))  # the same one elsewhere
    capfd.readouterr()
    open_pipeline(str(run), None, "ema", CPU)
    assert "warning" not in capfd.readouterr().out
    shift(moved / "ema.safetensors")
    open_pipeline(str(run), None, "ema", CPU)
    assert "another VAE " in capfd.readouterr().out
    open_pipeline(str(run), None, "ema", CPU, vae=str(moved))
    assert "warning" not in capfd.readouterr().out
    with pytest.raises(UserError, match=f"{tmp_path / 'run'} .*VAE.*--overwrite"):
        train(Config(**options | dict(train_steps=8)))
    state = checkpoint.read(run)
    old = {k: v for k, v in state.items() if k != "frozen"}  # of before digests were kept
    (tmp_path / "old").mkdir()
    checkpoint.save(tmp_path / "old", old, 1)
    open_pipeline(str(tmp_path / "old" / "model.pt"), None, "ema", CPU)
    assert "warning" not in capfd.readouterr().out


@pytest.mark.slow
def test_another_text_encoder_under_the_same_path(latent, sd_folder, tmp_path, capfd):
    folder = tmp_path / "sd"
    shutil.copytree(sd_folder, folder)
    options = latent | options_of(str(folder)) | dict(train_steps=2)
    train(Config(**options))
    shift(folder / "text_encoder" / "model.safetensors")
    capfd.readouterr()
    open_pipeline(str(tmp_path / "run" / "model.pt"), None, "ema", CPU, vae=sd_folder)
    assert "another text encoder " in capfd.readouterr().out
    open_pipeline(str(tmp_path / "run" / "model.pt"), sd_folder, "ema", CPU)
    assert "warning" not in capfd.readouterr().out
    with pytest.raises(UserError, match=f"{tmp_path / 'run'} .*text encoder.*--overwrite"):
        train(Config(**options | dict(train_steps=4)))


def test_half_precision_files_are_computed_in_float32(latent, sd_folder, tmp_path):
    sd = loader.load_sd(sd_folder)
    for part in (sd.unet, sd.vae, sd.text_encoder):
        part.half()
    loader.save_sd_folder(sd, tmp_path / "half")
    pipeline = open_pipeline(None, str(tmp_path / "half"), "ema", CPU, amp="no")
    for network in (*pipeline.networks.values(), pipeline.codec.vae):
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    config = Config(**latent | dict(vae=str(tmp_path / "half" / "vae"), condition="none"))
    mean, _ = open_stack(config, CPU).codec.vae.encode(torch.zeros(1, 3, 16, 16))
    assert mean.dtype == torch.float32


def test_networks_that_do_not_go_together(latent, vae, sd_folder, tmp_path):
    import diffusers

    shutil.copytree(sd_folder, tmp_path / "inpainting")
    config = json.loads((tmp_path / "inpainting" / "unet" / "config.json").read_text())
    config = {k: v for k, v in config.items() if not k.startswith("_")} | {"in_channels": 9}
    diffusers.UNet2DConditionModel(**config).save_pretrained(tmp_path / "inpainting" / "unet")
    with pytest.raises(UserError, match="inpainting .*9 channels"):
        open_stack(Config(**latent | options_of(str(tmp_path / "inpainting"))), CPU)
    with pytest.raises(UserError, match="4 channels.* 3"):
        open_pipeline(None, sd_folder, "ema", CPU, vae=str(vae))
    train(Config(**latent | dict(train_steps=2)))
    with pytest.raises(UserError, match="3 channels.* 4"):
        open_pipeline(str(tmp_path / "run" / "model.pt"), None, "ema", CPU, vae=sd_folder)


def test_vaes_as_files(sd_folder, tmp_path):
    sd = loader.load_sd(sd_folder)
    loader.save_sd_file(sd, tmp_path / "whole.safetensors")
    tensors = load_file(tmp_path / "whole.safetensors")
    bare = {
        k.removeprefix("first_stage_model."): v for k, v in tensors.items() if "first_stage" in k
    }
    rest = {k: v for k, v in tensors.items() if "first_stage" not in k}
    save_file(rest, tmp_path / "rest.safetensors")
    shutil.copy(f"{sd_folder}/vae/config.json", tmp_path)
    save_file(bare, tmp_path / "bare.safetensors")
    torch.save({"state_dict": bare}, tmp_path / "bare.ckpt")
    shutil.copytree(f"{sd_folder}/vae", tmp_path / "plain")
    files = [
        "bare.safetensors",
        "bare.ckpt",
        "whole.safetensors",
        "plain/diffusion_pytorch_model.safetensors",
    ]
    for file in files:
        found = load_vae(str(tmp_path / file)).state_dict()
        for name, value in sd.vae.state_dict().items():
            assert torch.equal(found[name], value)
    draw = lambda path, **given: open_pipeline(None, str(path), "ema", CPU, amp="no", **given).sample(  # noqa: E731
        [0], steps=2, prompts=["x"], amp="no")  # fmt: skip
    expected = draw(sd_folder)
    found = draw(tmp_path / "rest.safetensors", config=sd_folder, vae=str(tmp_path / files[0]))
    # weights lie elsewhere in memory, and on some processors sums are then in another order
    assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="rest.safetensors .*--vae"):
        draw(tmp_path / "rest.safetensors", config=sd_folder)


# --- pictures -------------------------------------------------------------------------------------


def test_batch_mates_change_nothing(sd_folder, tmp_path, monkeypatch):
    from diffusion.commands import sample

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n" + "a very long prompt " * 12 + "\na dog\n")
    made = []
    for size in (1, 2, 3):
        folder = tmp_path / str(size)
        monkeypatch.setattr(sys, "argv", ["sample.py", "--sd_path", sd_folder, "--prompt", f"@{prompts}", "--steps", "3",
                            "--batch_size", str(size), "--amp", "no", "--device", "cpu", "--save_folder", str(folder)])  # fmt: skip
        sample.main()
        made.append(
            [
                np.asarray(Image.open(folder / "images" / f"{i:06d}.png")).astype(int)
                for i in range(3)
            ]
        )
    for other in made[1:]:
        assert np.abs(np.array(other) - np.array(made[0])).max() <= 2


def test_export_keeps_the_clip_skip(latent, sd_folder, tmp_path, monkeypatch):
    train(Config(**latent | options_of(sd_folder) | dict(train_steps=2, clip_skip=2)))
    model = tmp_path / "run" / "model.pt"
    monkeypatch.setattr(sys, "argv", ["export", str(model), str(tmp_path / "made")])
    export.main()
    before = loader.load_sd(sd_folder).text_encoder.config.num_hidden_layers
    written = json.loads((tmp_path / "made" / "text_encoder" / "config.json").read_text())
    assert written["num_hidden_layers"] == before - 1
    eps = torch.randn(1, 4, 16, 16)
    a, b = (p.sample([0], steps=3, eps=eps, prompts=["a fox"], guidance_scale=5.0, amp="no") for p in (
        open_pipeline(str(model), None, "ema", CPU), open_pipeline(None, str(tmp_path / "made"), "ema", CPU, amp="no")))  # fmt: skip
    assert_close(a, b)


@pytest.mark.slow
def test_models_that_have_moved_are_measured_and_shown(latent, vae, faces, tmp_path, monkeypatch):
    from diffusion.commands import visualize
    from diffusion.evaluation import __main__ as metrics

    shutil.copytree(vae, tmp_path / "vae")
    train(Config(**latent | dict(vae=str(tmp_path / "vae"), train_steps=2)))
    (tmp_path / "vae").rename(tmp_path / "moved")
    model = str(tmp_path / "run" / "model.pt")

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.float().mean((2, 3))

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    shared = ["--device", "cpu", "--save_folder", str(tmp_path), "--vae", str(tmp_path / "moved")]
    monkeypatch.setattr(sys, "argv", ["visualize.py", "--load_path", model, "--steps", "3", "--num_images", "2", *shared])  # fmt: skip
    visualize.main()
    assert (tmp_path / "viz" / "backward.png").exists()
    measured = ["metrics", str(faces), model, "--fid_features", str(tmp_path / "mean.pt"), "--num_images", "4",
                "--samplers", "ddim:2", "--amp", "no", *shared]  # fmt: skip
    monkeypatch.setattr(sys, "argv", measured)
    metrics.main()
    result = json.loads((tmp_path / "metrics" / "quality.json").read_text())
    assert np.isfinite(result["rows"][0]["mean"]) and result["num_fake"] == 4
    monkeypatch.setattr(sys, "argv", [*measured[:2], str(faces), *measured[3:]])
    with pytest.raises(UserError, match="--vae.*model"):
        metrics.main()


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, told", [
    (dict(mode="latent", vae="x", heads=8, dropout=0.1), "--heads, --dropout:.*--mode pixel"),
    (dict(mode="vae", noise_offset=0.1), "--noise_offset:.*--mode pixel or latent"),
    (dict(mode="vae", checkpointing=True), "--checkpointing:"),
    (dict(mode="vae", vae="x"), "--vae:.*--mode latent"),
    (dict(vae="x", layers_per_block=3), "--vae:.*--mode latent"),
    (dict(mode="latent", vae="x", clip_skip=2), "--clip_skip:.*--sd_path"),
    (dict(mode="latent", vae="x", sd_config="y"), "--sd_config:.*--sd_path FILE"),
    (dict(mode="latent", vae="x", text_dim=64), "--text_dim:.*--condition text"),
    (dict(validation_prompts="x"), "--validation_prompts:.*--condition text"),
    (dict(sd_path="x", schedule="linear", time_steps=20), "--time_steps: .* from scratch"),
    (dict(sd_path="x", text_encoder="scratch"), "--text_encoder:"),
    (dict(sd_path="x", unet_dim=32), "--unet_dim:"),
    (dict(sd_path="x", layers_per_block=1), "--layers_per_block:"),
    (dict(sd_path="x", adapter="lora", vectors=2), "--vectors:.*--adapter textual_inversion"),
])  # fmt: skip
def test_options_that_would_do_nothing(change, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    made = dict(mode="latent", condition="text", objective="eps") if "sd_path" in change else {}
    with pytest.raises(UserError, match=told):
        resolve_config(Config(**made | change))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_give_no_option_that_does_nothing(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    given = {
        "anime_sd15": {"sd_path": "x", "data": "y"},
        "fine_tune": {"sd_path": "x"},
        "small": {"data": "y"},
    }.get(preset, {})
    resolve_config(config_from_args(given, preset))


def test_useless_options_of_sample(sd_folder, monkeypatch):
    from diffusion.commands import sample

    for args, told in (
        (("--sd_path", sd_folder, "--config", sd_folder), "describes a single file"),
        (("--sd_path", sd_folder, "--negative_prompt", "x"), "--negative_prompt.*--prompt"),
    ):
        monkeypatch.setattr(sys, "argv", ["sample.py", *args])
        with pytest.raises(UserError, match=told):
            sample.main()


def test_a_stable_diffusion_model_brings_its_settings(sd_folder, tmp_path):
    made = lambda **given: resolve_config(config_from_args(given), set(given))  # noqa: E731
    config = made(sd_path=sd_folder, data="somewhere")
    found = (
        config.mode,
        config.condition,
        config.objective,
        config.loss,
        config.learning_rate,
        config.image_size,
    )
    assert found == ("latent", "text", "eps", "l2", 1e-5, 32)
    assert made(sd_path=sd_folder, learning_rate=1e-4, image_size=64).image_size == 64
    assert made(sd_path=sd_folder, learning_rate=1e-4).learning_rate == 1e-4
    (tmp_path / "nothing").mkdir()
    assert made(sd_path=str(tmp_path / "nothing")).image_size == 512
    folder = tmp_path / "v"
    shutil.copytree(sd_folder, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    assert made(sd_path=str(folder)).objective == "v"
    lora = made(sd_path=sd_folder, adapter="lora", data="toy")
    assert (lora.image_size, lora.learning_rate, lora.unet_dim) == (32, 1e-3, 64)


def test_noise_offset_in_pixels(tiny):
    recipes = (open_recipe(Config(**tiny | dict(noise_offset=o)), CPU) for o in (0.0, 0.5))
    plain, moved = (recipe.draw(1)[0].eps for recipe in recipes)
    difference = moved - plain
    assert_close(difference, difference[:, :, :1, :1].expand_as(difference))
    assert 0.2 < difference.std() < 1


def test_dry_run_describes_what_is_trained(latent, tiny, sd_folder, scratch, tmp_path):
    def counted(**options):
        config = Config(**options)
        config = resolve_config(config, None, open_base(config) if config.adapts else None)
        return forward_cost(config, 3), config

    size = lambda network: sum(p.numel() for p in network.parameters())  # noqa: E731
    vae_run = plain(tiny, "time_steps", "sample_steps") | dict(
        mode="vae", condition="none", unet_dim=16
    )
    (total, trained, flops, kept), config = counted(**vae_run)
    sizes = vae_config(config.unet_dim, config.dim_mults, config.latent_channels, 32)
    assert total == trained == size(KLAutoencoder(sizes)) and flops > 0 and kept > 0
    for change in (dict(condition="text"), UNREAD | dict(condition="class"), options_of(sd_folder)):
        (total, trained, flops, kept), config = counted(**latent | change)
        network = build_network(config, 3, open_stack(config, CPU))
        assert total == trained == size(network) and flops > 0 and kept > 0
    for change in (LORA, INVERSION):
        (total, trained, _, _), config = counted(
            **on_scratch(scratch) | change | dict(data=str(tmp_path))
        )
        base = size(build_network(config, 0, open_stack(config, CPU)))
        assert total == base + trained and 0 < trained < base / 4
    inverted = INVERSION["vectors"] * 32
    assert trained == inverted
    (total, trained, _, _), _ = counted(**on_sd(sd_folder) | LORA)
    assert 0 < trained < total / 4


# --- data -----------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_read(latent, tmp_path):
    """With --no_cache, the next one stands in for it, with its own class and caption; also when
    the latents are there already."""
    data = tmp_path / "data"
    for i in range(12):
        folder = data / "ab"[i // 6]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(toy.draw(i, 16)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"caption {i}")
    (data / "a" / "05.png").write_bytes(b"broken")
    for _ in range(2):  # computed, then read
        for condition in ("class", "text"):
            options = latent | dict(condition=condition, data=str(data), cache=False)
            recipe = open_recipe(Config(**options), CPU)
            none = np.zeros(2, int)
            batch = recipe.batches._encoded(np.array([5, 6]), none.astype(bool), none)
            assert torch.equal(*batch.moments) and batch.labels.tolist() == [1, 1]
            assert condition != "text" or torch.equal(*batch.text)


def test_default_caption_of_hub_sets(latent, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from diffusion.data.stream import StreamBatches

    pictures = []
    for i in range(12):
        file = io.BytesIO()
        Image.fromarray(toy.draw(i, 16)).save(file, "PNG")
        pictures.append({"bytes": file.getvalue(), "path": None})
    monkeypatch.setattr(StreamBatches, "HELD_OUT", 4)
    for name, columns in (
        ("none", {}),
        ("some", {"text": [None if i % 2 else f"t{i}" for i in range(12)]}),
    ):
        features = {"image": datasets.Image()} | {k: datasets.Value("string") for k in columns}
        made = datasets.Dataset.from_dict(
            {"image": pictures} | columns, features=datasets.Features(features)
        )
        (tmp_path / name).mkdir()
        made.to_parquet(tmp_path / name / "x.parquet")
        for streaming in (False, True):
            options = latent | dict(data=f"hf:{tmp_path / name}", default_caption="grey")
            config = Config(**options | dict(streaming=streaming, batch_size=8))
            batches = open_recipe(config, CPU).batches
            captions = batches(0, 0, 8).captions if streaming else batches.pixels.images.captions
            assert ("grey" in captions) and (set(captions) == {"grey"}) == (name == "none")


def test_long_captions_are_counted(latent, faces, capfd):
    open_recipe(Config(**latent | dict(text_length=20)), CPU)
    out = capfd.readouterr().out
    assert out.count("18 tokens") == 1 and "120 of 120" in out
    open_recipe(Config(**latent | dict(text_length=256)), CPU)
    assert "warning" not in capfd.readouterr().out


def test_a_tokenizer_of_another_model(sd_folder, tmp_path):
    folder = tmp_path / "sd"
    shutil.copytree(sd_folder, folder)
    file = folder / "tokenizer" / "added_tokens.json"
    size = len(json.loads((folder / "tokenizer" / "vocab.json").read_text()))
    file.write_text(json.dumps({"<more>": size}))
    with pytest.raises(UserError, match=f"{size + 1} tokens.* {size}"):
        open_pipeline(None, str(folder), "ema", CPU)
