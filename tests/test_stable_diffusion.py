"""Stable Diffusion's files and pictures against diffusers, on tiny models of random weights."""

import json
import shutil

import pytest
import torch
from helpers import CPU
from torch.testing import assert_close

from diffusion import UserError
from diffusion.files import (
    sd_files as loader,
)
from diffusion.files import (
    sd_names as rules,
)
from diffusion.files.tensors import find_weights, read_tensors
from diffusion.process.samplers import NOISE
from diffusion.runtime.seeding import ImageNoise
from diffusion.sampling.load import open_pipeline

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (tests/requirements.txt)")
pytest.importorskip("transformers", reason="needs transformers (tests/requirements.txt)")
from diffusers_models import (  # noqa: E402
    SCHEDULERS,
    SHAPES,
    make_pipeline,
    our_latents,
    their_latents,
)


@pytest.fixture(scope="module", params=SHAPES)
def theirs(request, tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_latents_are_diffusers(theirs, sampler, guidance):
    """Same noise, weights and scheduler: within 1e-4 in float32."""
    pipeline, folder = theirs
    ours = open_pipeline(None, str(folder), "ema", CPU, amp="no")
    eps = torch.randn(2, *ours.shape, generator=torch.Generator().manual_seed(1))
    prompts, negative = ["a red fox", "two cats, sleeping"], ["blurry"] * 2
    expected = their_latents(pipeline, sampler, eps, 7, prompt=prompts, negative_prompt=negative,
                             guidance_scale=guidance)  # fmt: skip
    options = {"prompts": prompts, "negative_prompts": negative, "guidance_scale": guidance}
    found = our_latents(ours, sampler, eps, 7, **options)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    sequential = our_latents(ours, sampler, eps, 7, batched=False, **options)
    assert_close(sequential, found, rtol=1e-4, atol=1e-4)
    assert len(ours.table(sampler, 7)) == 7
    images = pipeline.vae.decode(expected / 0.18215).sample
    assert_close(ours.decode(found), images, rtol=1e-3, atol=1e-3)


def test_ddpm_is_diffusers(theirs, monkeypatch):
    """To the last step, which ends without noise; at each step the same noise."""
    pipeline, folder = theirs
    ours = open_pipeline(None, str(folder), "ema", CPU, amp="no")
    noise = ImageNoise(0, range(2), ours.shape)
    eps = noise()
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: noise()
    )
    monkeypatch.setitem(SCHEDULERS, "ddpm", "DDPMScheduler")
    prompts = ["a red fox", "two cats"]
    expected = their_latents(pipeline, "ddpm", eps, 7, prompt=prompts, guidance_scale=3.0)
    found = our_latents(ours, "ddpm", eps, 7, prompts=prompts, guidance_scale=3.0)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for sampler in ("ddpm", "ddpm_large"):
        table = ours.table(sampler, 7)
        assert table.levels[-1].tolist() == [1, 0] and table.to_x[-1, NOISE] == 0
    with pytest.raises(ValueError, match="--spacing trailing"):
        ours.table("ddim", 1000)
    assert len(ours.table("ddim", 1000, spacing="trailing")) == 1000


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_v_prediction(tmp_path, sampler):
    pipeline, folder = make_pipeline(tmp_path, "small", "v_prediction")
    ours = open_pipeline(None, str(folder), "ema", CPU, amp="no")
    eps = torch.randn(1, *ours.shape, generator=torch.Generator().manual_seed(1))
    expected = their_latents(pipeline, sampler, eps, 10, prompt=["x"], guidance_scale=3.0)
    found = our_latents(ours, sampler, eps, 10, prompts=["x"], guidance_scale=3.0)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_other_sizes_of_image(theirs):
    pipeline, folder = theirs
    ours = open_pipeline(None, str(folder), "ema", CPU, amp="no", height=40, width=24)
    eps = torch.randn(1, *ours.shape, generator=torch.Generator().manual_seed(1))
    expected = their_latents(pipeline, "ddim", eps, 5, prompt=["x"], height=40, width=24)
    found = our_latents(ours, "ddim", eps, 5, prompts=["x"], guidance_scale=7.5)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert ours.decode(found).shape == (1, 3, 40, 24)
    with pytest.raises(UserError, match="height is 41.* 40 "):
        open_pipeline(None, str(folder), "ema", CPU, amp="no", height=41)


def test_folder_round_trip(theirs, tmp_path):
    """What we write, diffusers reads: same image from the same noise."""
    pipeline, folder = theirs
    sd = loader.load_sd(folder)
    loader.save_sd_folder(sd, tmp_path / "again")
    again = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "again", safety_checker=None, local_files_only=True
    )
    again.set_progress_bar_config(disable=True)
    eps = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    a = their_latents(pipeline, "ddim", eps, 3, prompt=["a fox"])
    b = their_latents(again, "ddim", eps, 3, prompt=["a fox"])
    assert_close(a, b, rtol=0, atol=1e-6)


def test_single_file_round_trip(theirs, tmp_path):
    """Our original single file: read by diffusers' from_single_file, and by us."""
    pipeline, folder = theirs
    sd = loader.load_sd(folder)
    loader.save_sd_file(sd, tmp_path / "model.safetensors")
    ours = loader.load_sd(tmp_path / "model.safetensors", config=folder)
    for part in ("unet", "vae", "text_encoder"):
        a, b = (getattr(x, part).state_dict() for x in (sd, ours))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    again = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(folder), local_files_only=True,
        safety_checker=None,
    )  # fmt: skip
    again.set_progress_bar_config(disable=True)
    eps = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    a, b = (their_latents(p, "ddim", eps, 3, prompt=["a fox"]) for p in (pipeline, again))
    assert_close(a, b, rtol=0, atol=1e-6)
    theirs_unet = diffusers.UNet2DConditionModel.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(folder), subfolder="unet", local_files_only=True
    )  # fmt: skip
    theirs_vae = diffusers.AutoencoderKL.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(folder), subfolder="vae", local_files_only=True
    )  # fmt: skip
    for part, model in (("unet", theirs_unet), ("vae", theirs_vae)):
        a, b = getattr(sd, part).state_dict(), model.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_tables_name_stable_diffusions_tensors():
    """diffusers' own translation of every name, at full size."""
    from diffusers.loaders import single_file_utils as utils

    from diffusion.models.configs import UNetConfig, VAEConfig

    with torch.device("meta"):
        ours = {"unet": loader.SDUNet(UNetConfig()), "vae": loader.AutoencoderKL(VAEConfig())}
    tables = {"unet": rules.unet_table, "vae": rules.vae_table}
    convert = {"unet": utils.convert_ldm_unet_checkpoint, "vae": utils.convert_ldm_vae_checkpoint}
    for part, model in ours.items():
        config = model.config.to_dict()
        known = tables[part](config)
        names = [rules.translate(name, known) for name in model.state_dict()]
        assert len(set(names)) == len(names)
        prefix = rules.PREFIXES[part][0]
        file = {prefix + name: torch.empty(4, 4, 1, 1) for name in names}
        made = convert[part](file, config)
        assert set(made) == set(model.state_dict())
    assert "output_blocks.11.0.skip_connection.weight" in [
        rules.translate(n, rules.unet_table(ours["unet"].config.to_dict()))
        for n in ours["unet"].state_dict()
    ]


# --- the shapes that files come in ---------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return make_pipeline(tmp_path / "sd", "small")[1]


def weights_of(folder, part):
    return read_tensors(find_weights(folder / part))


def replace_weights(folder, part, name, tensors):
    from safetensors.torch import save_file

    find_weights(folder / part).unlink()
    path = folder / part / name
    if name.endswith(".bin"):
        torch.save(tensors, path)
    else:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def same_as(folder, before):
    sd = loader.load_sd(folder)
    for part in before:
        found = getattr(sd, part).state_dict()
        assert found.keys() == before[part].keys()
        for k in found:
            assert_close(found[k].float(), before[part][k].float(), rtol=0, atol=0)
    return sd


@pytest.fixture
def before(folder):
    sd = loader.load_sd(folder)
    return {p: getattr(sd, p).state_dict() for p in ("unet", "vae", "text_encoder")}


def test_bin_and_fp16_files(folder, before):
    replace_weights(folder, "unet", "diffusion_pytorch_model.bin", weights_of(folder, "unet"))
    half = {k: v.half() for k, v in weights_of(folder, "vae").items()}
    replace_weights(folder, "vae", "diffusion_pytorch_model.fp16.safetensors", half)
    sd = loader.load_sd(folder)
    assert next(sd.vae.parameters()).dtype == torch.float16
    for k, v in sd.unet.state_dict().items():
        assert torch.equal(v, before["unet"][k])


def test_sharded_files(folder, before):
    from safetensors.torch import save_file

    tensors = weights_of(folder, "unet")
    find_weights(folder / "unet").unlink()
    names, table = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors"
        save_file({k: tensors[k].contiguous() for k in part}, folder / "unet" / file)
        table |= dict.fromkeys(part, file)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    same_as(folder, before)
    index.write_text(json.dumps({"weight_map": table | {"x": "../../etc.safetensors"}}))
    with pytest.raises(UserError, match="safetensors.index.json"):
        loader.load_sd(folder)


def test_text_encoder_with_and_without_prefix(folder, before):
    tensors = weights_of(folder, "text_encoder")
    plain = {k.removeprefix("text_model."): v for k, v in tensors.items()}
    for make in (plain, {f"text_model.{k}": v for k, v in plain.items()}):
        extra = {"embeddings.position_ids": torch.arange(77)[None]} if make is plain else {
            "text_model.embeddings.position_ids": torch.arange(77)[None]}  # fmt: skip
        replace_weights(folder, "text_encoder", "model.safetensors", make | extra)
        same_as(folder, before)


def test_old_names_of_the_vaes_attention(folder, before):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in weights_of(folder, "vae").items():
        for new, was in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        renamed[name] = value
    assert any("query" in name for name in renamed)
    replace_weights(folder, "vae", "diffusion_pytorch_model.safetensors", renamed)
    sd = same_as(folder, before)
    assert any(line.startswith("vae") and "original names" in line for line in sd.report)


def single_file(folder, path):
    sd = loader.load_sd(folder)
    loader.save_sd_file(sd, path)
    return read_tensors(path)


def test_ckpt_nested_with_averaged_weights_and_without_text_model(folder, before, tmp_path):
    tensors = single_file(folder, tmp_path / "a.safetensors")
    old = {k.replace("transformer.text_model.", "transformer."): v for k, v in tensors.items()}
    averaged = {"model_ema." + k.removeprefix("model.").replace(".", ""): v + 1
                for k, v in tensors.items() if k.startswith("model.diffusion_model.")}  # fmt: skip
    assert len(averaged) > 100
    extra = {"betas": torch.ones(3), "model_ema.decay": torch.tensor(0.9)}
    torch.save({"state_dict": {"state_dict": old | averaged | extra}}, tmp_path / "a.ckpt")
    raw = loader.load_sd(tmp_path / "a.ckpt", config=folder)
    ema = loader.load_sd(tmp_path / "a.ckpt", config=folder, weights="ema")
    name = "conv_in.weight"
    assert torch.equal(raw.unet.state_dict()[name], before["unet"][name])
    assert torch.equal(ema.unet.state_dict()[name], before["unet"][name] + 1)
    assert torch.equal(ema.text_encoder.state_dict()["text_model.final_layer_norm.bias"],
                       before["text_encoder"]["text_model.final_layer_norm.bias"])  # fmt: skip
    assert any("EMA weights" in line for line in ema.report)
    assert any("not used: 1 tensors, such as betas" in line for line in ema.report)


def test_a_lightning_checkpoint_opens_without_its_code(tmp_path):
    """Its callback's class is named in the pickle; an inert stub stands for it."""
    import sys
    import types

    names = "pytorch_lightning.callbacks.model_checkpoint".split(".")
    modules = {}
    for i in range(len(names)):
        modules[".".join(names[: i + 1])] = types.ModuleType(".".join(names[: i + 1]))
    kind = type("ModelCheckpoint", (), {"__module__": ".".join(names)})
    modules[".".join(names)].ModelCheckpoint = kind
    sys.modules.update(modules)
    try:
        torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": {kind: {"best": 1}}}, tmp_path / "l.ckpt")  # fmt: skip
    finally:
        for name in modules:
            del sys.modules[name]
    assert_close(read_tensors(tmp_path / "l.ckpt"), {"a": torch.ones(2)})


def test_wrong_files(folder, tmp_path):
    from safetensors.torch import save_file

    tensors = single_file(folder, tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    one = torch.ones(1)
    files = {
        "lora": {"lora_unet_down_blocks_0.lora_up.weight": one},
        "sdxl": {"conditioner.embedders.0.x": one, "model.diffusion_model.x": one},
        "flux": {"double_blocks.0.img_attn.proj.weight": one},
        "sd2": {"cond_stage_model.model.transformer.resblocks.0.x": one},
        "other": {"layers.0.weight": one},
        "short": {k: v for k, v in tensors.items() if "middle_block.0" not in k},
        "over": tensors | {"model.diffusion_model.extra.weight": one},
    }
    for name, content in files.items():
        save_file({k: v.clone() for k, v in content.items()}, tmp_path / f"{name}.safetensors")
    (tmp_path / "evil.ckpt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (tmp_path / "text.ckpt").write_text("hello")
    for name, told in {
        "cut.safetensors": "truncated", "lora.safetensors": "is a LoRA",
        "sdxl.safetensors": "Stable Diffusion XL", "flux.safetensors": "is Flux",
        "sd2.safetensors": "Stable Diffusion 2", "other.safetensors": "holds no unet: .* layers.0.weight",
        "short.safetensors": "missing", "over.safetensors": "left over 1: extra.weight",
        "evil.ckpt": "truncated|not opened", "text.ckpt": "truncated|not opened",
        "none.safetensors": "does not exist",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=told):
            loader.load_sd(tmp_path / name, config=folder)
    with pytest.raises(UserError, match="--config"):
        loader.load_sd(tmp_path / "good.safetensors")


def test_wrong_folders(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    with pytest.raises(UserError, match="/unet"):
        loader.load_sd(tmp_path)
    config = folder / "unet" / "config.json"
    text = config.read_text()
    for change, told in (
        ({"addition_embed_type": "text_time"}, "addition_embed_type"),
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"block_out_channels": [32, 32]}, "of another shape"),
    ):
        config.write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(UserError, match=told):
            loader.load_sd(folder)
    config.write_text("{")
    with pytest.raises(UserError, match="config.json .*JSON"):
        loader.load_sd(folder)
    config.write_text(text)
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="vocab.json"):
        loader.load_sd(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match="vae"):
        loader.load_sd(folder)
