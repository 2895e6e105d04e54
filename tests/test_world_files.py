"""Weight files as the world has them: embeddings by file name, stale averages, v-prediction, LoRAs
that are more than branches. diffusers and peft are the oracles; models are tiny."""

import json
import random
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from warm import script

import diffusion
from diffusion import UserError
from diffusion.config import Config
from diffusion.files import adapter_files as adapters
from diffusion.files import checkpoint, embedding_files
from diffusion.files import sd_files as loader
from diffusion.models import lora
from diffusion.sampling.load import open_pipeline, open_stack
from diffusion.training.finetune_config import resolve_config

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (tests/requirements.txt)")
peft = pytest.importorskip("peft", reason="needs peft (tests/requirements.txt)")
pytest.importorskip("transformers", reason="needs transformers (tests/requirements.txt)")
from diffusers_models import make_pipeline, our_latents, their_latents  # noqa: E402

CPU = torch.device("cpu")
EPS = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
SAMPLE = ("--device", "cpu", "--amp", "no", "--steps", 2, "--num_images", 1, "--prompt", "a fox")
WIDTH = 32


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("world"), "small")[1]


@pytest.fixture(scope="module")
def tensors(sd, tmp_path_factory):
    """Those of an original single file that states nothing about itself."""
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    loader.save_sd_file(loader.load_sd(sd), path)
    return load_file(path)


def theirs(folder):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_theirs(pipeline, prompt="a red fox"):
    return their_latents(pipeline, "ddim", EPS, 3, prompt=[prompt], guidance_scale=3.0)


def draw_ours(path, prompt="a red fox", **options):
    pipeline = open_pipeline(None, str(path), None, CPU, amp="no", **options)
    return our_latents(pipeline, "ddim", EPS, 3, prompts=[prompt], guidance_scale=3.0)


def picture(folder):
    return np.array(Image.open(folder / "images" / "000000.png"))


# --- textual inversion ----------------------------------------------------------------------------


VECTORS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))
LAYOUTS = {
    # file: (its content, metadata of a safetensors, the name inside)
    "turner.pt": ({"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "turner-2800"}, None, "turner-2800"),
    "Dict.pt": ({"string_to_param": nn.ParameterDict({"*": nn.Parameter(VECTORS)}), "name": "OTHER"}, None, "OTHER"),
    "compvis.pt": ({"string_to_token": {"sks": 1}, "string_to_param": {"sks": VECTORS}}, None, "sks"),
    "plain.pt": ({"string_to_token": {"*": 1}, "string_to_param": {"*": VECTORS.half()}}, None, "plain"),
    "EasyNegative.safetensors": ({"emb_params": VECTORS}, {}, "EasyNegative"),
    "kohya.safetensors": ({"emb_params": VECTORS}, {"name": "inner"}, "inner"),
    "learned_embeds.bin": ({"<my-cat>": VECTORS}, None, "<my-cat>"),
    "My Style v2.0.bin": ({"<my-cat>": VECTORS[:, None]}, None, "<my-cat>"),
}  # fmt: skip


def write(path, content, metadata=None):
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in content.items()}, path, metadata=metadata)
    else:
        torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def their_text(sd):
    """What diffusers makes of the vectors under a token of its own: prompt -> embedding."""
    pipeline = theirs(sd)
    pipeline.load_textual_inversion({"<oracle>": VECTORS}, token="<oracle>")
    pipeline.load_textual_inversion({"<half>": VECTORS.half()}, token="<half>")
    return lambda prompt: pipeline.encode_prompt(prompt, CPU, 1, False)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_embedding_answers_to_its_files_name_and_to_the_name_inside(
    sd, their_text, tmp_path, capsys, name
):
    """What the U-Net attends to is what diffusers makes of these vectors, for either name."""
    content, metadata, inside = LAYOUTS[name]
    file = write(tmp_path / name, content, metadata)
    ours = open_pipeline(None, str(sd), None, CPU, amp="no", embeddings=[file])
    expected = their_text(f"a {'<half>' if name == 'plain.pt' else '<oracle>'}, red")
    for word in (file.stem, inside, file.stem.upper()):
        found = ours.conditioning.embed([f"a {word}, red"])
        assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda m: f"{word}: {m}")
    assert (ours.conditioning.embed(["a b, red"]) - expected).abs().max() > 0.1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
    assert f"{file.stem!r}" in line and f"{inside!r}" in line and "3 vectors" in line


def test_an_embedding_may_be_a_word_of_the_vocabulary_and_is_found_as_a_whole_word(sd, tmp_path):
    file = write(tmp_path / "a.pt", VECTORS)
    other = write(tmp_path / "zzz.pt", VECTORS)
    as_word = draw_ours(sd, "a fox", embeddings=[file])
    assert_close(as_word, draw_ours(sd, "zzz fox", embeddings=[other]), rtol=0, atol=0)
    for unlike in ("an ant", "la", "a1"):
        plain, with_it = draw_ours(sd, unlike), draw_ours(sd, unlike, embeddings=[file])
        assert_close(with_it, plain, rtol=0, atol=0)


def test_embeddings_of_the_same_name(sd, tmp_path):
    """A file's name comes before the name in another; a name inside both is nobody's."""
    (tmp_path / "b").mkdir()
    dog = write(tmp_path / "dog.bin", {"cat": VECTORS})
    cat = write(tmp_path / "cat.bin", {"<pet>": VECTORS + 1})
    bird = write(tmp_path / "bird.bin", {"<pet>": VECTORS - 1})
    run_a = write(tmp_path / "adapter.safetensors", {"<x>": VECTORS})
    run_b = write(tmp_path / "b" / "adapter.safetensors", {"<y>": VECTORS + 1})
    alone = draw_ours(sd, "a cat", embeddings=[cat])
    assert_close(draw_ours(sd, "a cat", embeddings=[dog, cat, bird]), alone, rtol=0, atol=0)
    alone = draw_ours(sd, "a <y>", embeddings=[run_b])
    assert_close(draw_ours(sd, "a <y>", embeddings=[run_a, run_b]), alone, rtol=0, atol=0)
    same = write(tmp_path / "b" / "cat.bin", {"<pet>": VECTORS})
    for twice in ([cat, same], [cat, cat]):
        with pytest.raises(UserError, match="'cat'.*exists already") as caught:
            draw_ours(sd, embeddings=twice)
        assert all(str(file) in str(caught.value) for file in twice)


def test_sampling_prints_tokens_and_warns_of_unused_ones(sd, tmp_path):
    used = write(tmp_path / "EasyNegative.safetensors", {"emb_params": VECTORS})
    unused = write(tmp_path / "cat.pt", {"<tom>": VECTORS[:1]})
    shared = (*SAMPLE, "--sd_path", sd, "--embedding", used, "--embedding", unused)
    done = script("sample.py", *shared, "--negative_prompt", "EasyNegative", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "EasyNegative.safetensors: 'EasyNegative', 3 vectors" in lines
    assert "cat.pt: 'cat' or '<tom>', 1 vector" in lines
    warned = [line for line in lines if "warning" in line]
    assert len(warned) == 1 and "'cat'" in warned[0] and "'<tom>'" in warned[0]
    # without guidance the negative prompt would not be read
    negative = ("--negative_prompt", "EasyNegative", "--guidance_scale", 1)
    done = script("sample.py", *shared, *negative, cwd=tmp_path)
    assert done.returncode == 1 and "negative_prompt" in done.stderr


def test_names_that_no_prompt_holds(sd, tmp_path, capsys):
    file = write(tmp_path / "<|endoftext|>.pt", {"<tom>": VECTORS})
    draw_ours(sd, "<tom>", embeddings=[file])
    assert "cannot be typed in a prompt" in capsys.readouterr().out
    file = write(tmp_path / "<|endoftext|>.pt", VECTORS)
    with pytest.raises(UserError, match=r"endoftext\|>' cannot be typed"):
        draw_ours(sd, embeddings=[file])
    for content, named in (
        ({"clip_l": VECTORS, "clip_g": VECTORS + 1}, "Stable Diffusion XL"),
        ({"emb_params": VECTORS, "emb_params_out": VECTORS + 1}, "emb_params_out"),
    ):
        with pytest.raises(UserError, match=named):
            draw_ours(sd, embeddings=[write(tmp_path / "x.safetensors", content)])


# --- averaged weights -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tensors, tmp_path_factory):
    """(a merged file with model_ema.*, one of these averages only)."""
    folder = tmp_path_factory.mktemp("both")
    unet = {k: v for k, v in tensors.items() if k.startswith("model.diffusion_model.")}
    ema = {
        "model_ema." + k.removeprefix("model.").replace(".", ""): v * 1.1 for k, v in unet.items()
    }
    torch.save(
        {"state_dict": tensors | ema | {"model_ema.decay": torch.tensor(0.9)}}, folder / "a.ckpt"
    )
    save_file(
        {k: v * 1.1 if k in unet else v for k, v in tensors.items()}, folder / "ema.safetensors"
    )
    save_file(tensors, folder / "plain.safetensors")
    return folder


def test_a_file_with_both_is_drawn_with_its_plain_weights(both, sd, tmp_path):
    """model_ema.* is what --weights ema draws with, and an error where it is not there."""
    pictures, printed = {}, {}
    for name, file, *given in (
        ("default", "a.ckpt"),
        ("raw", "a.ckpt", "--weights", "raw"),
        ("ema", "a.ckpt", "--weights", "ema"),
        ("only plain", "plain.safetensors"),
        ("only ema", "ema.safetensors"),
    ):
        done = script(
            "sample.py",
            *SAMPLE,
            "--sd_path",
            both / file,
            "--config",
            sd,
            *given,
            "--save_folder",
            tmp_path / name,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        pictures[name], printed[name] = picture(tmp_path / name), done.stdout
    assert np.array_equal(pictures["default"], pictures["only plain"])
    assert np.array_equal(pictures["raw"], pictures["only plain"])
    assert np.array_equal(pictures["ema"], pictures["only ema"])
    assert not np.array_equal(pictures["ema"], pictures["raw"])
    assert "model_ema.* are not used" in printed["default"]
    assert "--weights ema" in printed["default"] and "--weights ema" not in printed["only plain"]
    for path in (both / "plain.safetensors", sd):
        config = () if path == sd else ("--config", sd)
        done = script(
            "sample.py", *SAMPLE, "--sd_path", path, *config, "--weights", "ema", cwd=tmp_path
        )
        assert done.returncode == 1 and str(path) in done.stderr and "model_ema" in done.stderr
    part = loader.read_tensors(both / "a.ckpt")
    part.pop(next(name for name in part if name.startswith("model_ema.diff")))
    torch.save(part, tmp_path / "part.ckpt")
    with pytest.raises(UserError, match="--weights ema: .*part.ckpt holds .*not all of them"):
        loader.check_averaged(tmp_path / "part.ckpt", "--weights")


def train_on(sd, data, *given, cwd):
    options = (
        "--data",
        data,
        "--image_size",
        16,
        "--device",
        "cpu",
        "--amp",
        "no",
        "--batch_size",
        2,
        "--train_steps",
        1,
        "--num_samples",
        0,
        "--learning_rate",
        1e-12,
        "--cache_dir",
        cwd / "cache",
    )
    return script("train.py", "--sd_path", sd, *options, *given, cwd=cwd)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 30, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a fox")
    return folder


def test_training_begins_with_the_plain_weights(both, sd, captioned, tmp_path):
    """--sd_weights ema chooses the others, is remembered, and refused where there are none."""
    before = loader.load_sd(both / "a.ckpt", sd).unet.state_dict()["conv_in.weight"]
    for name, scale, *given in (("raw", 1.0), ("ema", 1.1, "--sd_weights", "ema")):
        done = train_on(
            both / "a.ckpt",
            captioned,
            "--sd_config",
            sd,
            "--save_folder",
            name,
            *given,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / name / "config.json").read_text())["sd_weights"] == name
        found = checkpoint.load_weights(tmp_path / name / "model.pt", "raw")[0]["conv_in.weight"]
        assert_close(found, before * scale, rtol=1e-5, atol=1e-6)
    done = train_on(
        both / "plain.safetensors",
        captioned,
        "--sd_config",
        sd,
        "--sd_weights",
        "ema",
        cwd=tmp_path,
    )
    assert (
        done.returncode == 1 and "plain.safetensors" in done.stderr and "model_ema" in done.stderr
    )
    done = train_on(sd, captioned, "--sd_weights", "ema", cwd=tmp_path)
    assert done.returncode == 1 and "--sd_weights" in done.stderr


def test_adapters_of_the_averaged_weights(both, sd, captioned, tmp_path):
    """A run of before sd_weights is continued; its command for sampling names the weights."""
    given = ("--sd_config", sd, "--adapter", "lora", "--save_folder", "run")
    done = train_on(both / "a.ckpt", captioned, *given, "--sd_weights", "ema", cwd=tmp_path)
    assert done.returncode == 0 and "--weights ema --lora" in done.stdout, done.stderr
    for file in [*(tmp_path / "run" / "checkpoints").iterdir(), tmp_path / "run" / "model.pt"]:
        state = torch.load(file, weights_only=True)
        state["config"].pop("sd_weights", None)
        torch.save(state, file)
    done = train_on(both / "a.ckpt", captioned, *given, "--train_steps", 2, cwd=tmp_path)
    assert done.returncode == 1 and "--sd_weights ema" in done.stderr
    done = train_on(
        both / "a.ckpt", captioned, *given, "--train_steps", 2, "--sd_weights", "ema", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


# --- v-prediction ---------------------------------------------------------------------------------

V = 'model:\n  target: ldm.LatentDiffusion\n  params:\n    parameterization: "v"\n'
MARKED = {
    # what states it: (the file's ending, extra tensors, metadata, the text of a .yaml)
    "v_pred": (".safetensors", {"v_pred": torch.tensor([])}, {}, None),
    "v_pred of a .ckpt": (".ckpt", {"v_pred": torch.ones(1)}, {}, None),
    "modelspec": (".safetensors", {}, {"modelspec.prediction_type": "v"}, None),
    "ComfyUI's metadata": (".safetensors", {}, {"modelspec.predict_key": "v"}, None),
    "kohya's metadata": (".safetensors", {}, {"ss_v_parameterization": "True"}, None),
    "a.yaml": (".ckpt", {}, {}, V),
    "a.yml": (".safetensors", {}, {}, V.replace('"', "")),
}  # fmt: skip


@pytest.fixture(scope="module")
def v_folder(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("v"), "small", "v_prediction")[1]


@pytest.fixture(scope="module")
def v_latents(v_folder):
    return draw_theirs(theirs(v_folder))


def marked_file(folder, tensors, kind):
    ending, extra, metadata, text = MARKED[kind]
    file = folder / f"a{ending}"
    if ending == ".ckpt":
        torch.save({"state_dict": tensors | extra, "global_step": 3}, file)
    else:
        save_file(tensors | extra, file, metadata=metadata)
    if text is not None:
        (folder / kind).write_text(text)
    return file


@pytest.mark.parametrize("kind", MARKED)
def test_v_prediction_is_found_in_and_beside_single_files(
    sd, tensors, v_latents, tmp_path, kind, capsys
):
    """As diffusers draws the same weights with a scheduler of v-prediction."""
    file = marked_file(tmp_path, tensors, kind)
    assert_close(draw_ours(file, config=str(sd)), v_latents, rtol=1e-4, atol=1e-4)
    assert "prediction type: v" in capsys.readouterr().out
    as_eps = draw_ours(file, config=str(sd), objective="eps")
    assert_close(as_eps, draw_ours(sd), rtol=1e-4, atol=1e-4)
    assert "overrides v" in capsys.readouterr().out


@pytest.mark.parametrize("name, text, found", [
    ("a.yaml", '{"model": {"params": {"parameterization": "v"}}}', "v_prediction"),
    ("a.yaml", "model: {params: {x: 1, parameterization: v}}", "v_prediction"),
    ("a.safetensors.yaml", "parameterization: v", "v_prediction"), ("a.YML", "parameterization: v", "v_prediction"),
    ("a.yaml", "# parameterization: v, {parameterization: v}\nx: 1", "epsilon"),
])  # fmt: skip
def test_spellings_of_a_yaml_beside_a_file(tensors, tmp_path, name, text, found):
    save_file(tensors, tmp_path / "a.safetensors")
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / name).write_text(text, encoding=encoding)
        assert loader.find_prediction(tmp_path / "a.safetensors").type == found


def test_an_unknown_prediction_type_may_be_overridden(sd, tensors, v_latents, tmp_path, capsys):
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, metadata={"modelspec.prediction_type": "flow"})
    with pytest.raises(UserError, match="'flow'.*--objective"):
        draw_ours(file, config=str(sd))
    found = draw_ours(file, config=str(sd), objective="v")
    assert_close(found, v_latents, rtol=1e-4, atol=1e-4)
    assert "'flow'" in capsys.readouterr().out
    # in training, too
    start = Config(
        mode="latent", condition="text", sd_path=str(file), sd_config=str(sd), objective="v"
    )
    with pytest.raises(UserError, match="'flow'.*--objective"):
        resolve_config(start, {"sd_path", "sd_config"})
    open_stack(resolve_config(start, {"sd_path", "sd_config", "objective"}), CPU)
    assert "'flow'" in capsys.readouterr().out


def test_what_is_assumed_is_said_and_objective_overrides_it(
    sd, tensors, v_folder, v_latents, tmp_path, capsys
):
    save_file(tensors, tmp_path / "a.safetensors")
    plain = draw_ours(tmp_path / "a.safetensors", config=str(sd))
    assert_close(plain, draw_ours(sd), rtol=1e-4, atol=1e-4)
    assert "which a.safetensors does not state; give --objective v" in capsys.readouterr().out
    for path, given in ((tmp_path / "a.safetensors", {"config": str(sd)}), (sd, {})):
        found = draw_ours(path, objective="v", **given)
        assert_close(found, v_latents, rtol=1e-4, atol=1e-4)
    # the folder of --config says v; a statement of the file itself comes first
    assert_close(
        draw_ours(tmp_path / "a.safetensors", config=str(v_folder)), v_latents, rtol=1e-4, atol=1e-4
    )
    save_file(
        tensors, tmp_path / "a.safetensors", metadata={"modelspec.prediction_type": "epsilon"}
    )
    assert_close(
        draw_ours(tmp_path / "a.safetensors", config=str(v_folder)), plain, rtol=1e-4, atol=1e-4
    )
    for extra, metadata, named in (
        ({}, {"modelspec.prediction_type": "flow"}, "'flow'.*modelspec.prediction_type"),
        ({"edm_vpred.sigma_max": torch.ones(1)}, {}, "edm_vpred.sigma_max"),
    ):
        save_file(tensors | extra, tmp_path / "b.safetensors", metadata=metadata)
        with pytest.raises(UserError, match=named):
            draw_ours(tmp_path / "b.safetensors", config=str(sd))


def test_a_file_of_zero_terminal_snr(sd, tensors, tmp_path):
    """ztsnr beside v_pred: diffusers' rescaled betas, trailing timesteps."""
    save_file(
        tensors | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])},
        tmp_path / "a.safetensors",
    )
    pipeline = theirs(sd)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    # 4 divides 1000: diffusers' step is 1000 // steps, its trailing timesteps are rounded
    expected = pipeline(
        ["a red fox"], latents=EPS, num_inference_steps=4, output_type="latent", guidance_scale=3.0
    )
    ours = open_pipeline(None, str(tmp_path / "a.safetensors"), None, CPU, amp="no", config=str(sd))
    found = our_latents(ours, "ddim", EPS, 4, prompts=["a red fox"], guidance_scale=3.0)
    assert_close(found, expected.images, rtol=1e-4, atol=1e-4)
    # a value for eps, which says nothing of x0 there, leaves the schedule as it was
    assert_close(
        draw_ours(tmp_path / "a.safetensors", config=str(sd), objective="eps"),
        draw_ours(sd),
        rtol=1e-4,
        atol=1e-4,
    )


def test_objective_is_of_foreign_models_in_sampling(model, tmp_path):
    done = script(
        "sample.py", "--load_path", model, "--objective", "v", "--num_images", 1, cwd=tmp_path
    )
    assert done.returncode == 1 and "--objective" in done.stderr and str(model) in done.stderr
    done = script("sample.py", "--load_path", model, "--objective", "y", cwd=tmp_path)
    assert done.returncode == 2 and "--objective" in done.stderr


def test_training_and_export_know_what_a_file_predicts(sd, tensors, captioned, tmp_path):
    """A v file is trained as v, and exported as one that diffusers and we draw alike."""
    marked_file(tmp_path, tensors, "v_pred")
    given = ("--sd_config", sd, "--save_folder", tmp_path / "run")
    done = train_on(
        tmp_path / "a.safetensors", captioned, *given, "--objective", "eps", cwd=tmp_path
    )
    assert done.returncode == 1 and "v_pred" in done.stderr and "--objective v" in done.stderr
    done = train_on(tmp_path / "a.safetensors", captioned, *given, cwd=tmp_path)
    assert done.returncode == 0 and "prediction type: v" in done.stdout, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["objective"] == "v"
    (tmp_path / "plain").mkdir()
    save_file(tensors, tmp_path / "plain" / "a.safetensors")  # states nothing: --objective decides
    moved = tmp_path / "plain" / "a.safetensors"
    done = train_on(
        moved,
        captioned,
        "--sd_config",
        sd,
        "--save_folder",
        "other",
        "--objective",
        "v",
        "--adapter",
        "lora",
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "--objective v --lora" in done.stdout, done.stderr
    for target in ("folder", "file.safetensors"):
        export(tmp_path / "run" / "model.pt", tmp_path / target, moved)
    expected = draw_theirs(theirs(tmp_path / "folder"))
    for path, options in (
        (tmp_path / "folder", {}),
        (tmp_path / "file.safetensors", {"config": str(sd)}),
    ):
        assert_close(draw_ours(path, **options), expected, rtol=1e-4, atol=1e-4)
    again = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "file.safetensors"),
        config=str(sd),
        local_files_only=True,
        safety_checker=None,
    )
    assert again.unet.conv_in.weight.shape == (32, 4, 3, 3)


def export(model, target, moved):
    from diffusion.files.sd_export import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export", str(model), str(target), "--sd_path", str(moved)])
        main()


# --- LoRA -----------------------------------------------------------------------------------------


def with_adapter(sd, **config):
    """diffusers' pipeline with a LoRA of random values on its U-Net."""
    pipeline = theirs(sd)
    torch.manual_seed(3)
    usual = dict(r=4, lora_alpha=7, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline.unet.add_adapter(peft.LoraConfig(**usual | config))
    return pipeline


def test_alpha_of_save_lora_adapter(sd, tmp_path):
    """diffusers' metadata of one network alone has no prefix."""
    pipeline = with_adapter(sd, alpha_pattern={"attn2.to_v": 3}, use_rslora=True)
    pipeline.unet.save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    found = draw_ours(sd, loras=[(file, 1.0)])
    assert_close(found, draw_theirs(pipeline), rtol=1e-4, atol=1e-4)
    assert (found - draw_ours(sd)).abs().max() > 0.05


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_initialisations_that_change_the_base(sd, tmp_path, init):
    """Refused by name, from a folder and from metadata; read once peft has converted them."""
    pipeline = theirs(sd)
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=init)
    wrapped = peft.get_peft_model(pipeline.unet, config)
    # as peft's own example of a conversion has it
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = init
    for name, value in wrapped.named_parameters():
        if "lora_" in name:
            value.data += torch.randn_like(value) / 10
    expected = draw_theirs(pipeline)
    wrapped.save_pretrained(tmp_path / "raw")
    with pytest.raises(UserError, match=f"init_lora_weights is '{init}'.*path_initial_model"):
        draw_ours(sd, loras=[(tmp_path / "raw", 1.0)])
    wrapped.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    found = draw_ours(sd, loras=[(tmp_path / "converted", 1.0)])
    assert_close(found, expected, rtol=1e-3, atol=1e-3)
    metadata = {
        "lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 8, "init_lora_weights": init})
    }
    branches = load_file(tmp_path / "raw" / "adapter_model.safetensors")
    save_file(branches, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=f"x.safetensors: init_lora_weights is '{init}'"):
        draw_ours(sd, loras=[(tmp_path / "x.safetensors", 1.0)])


def test_the_file_inside_a_peft_folder(sd, tmp_path):
    """Its settings stand beside it: the alpha counts, and what is refused of a folder is, too."""
    pipeline = theirs(sd)
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=13, target_modules=["to_q", "to_v"], use_rslora=True,
                             init_lora_weights=False)  # fmt: skip
    wrapped = peft.get_peft_model(pipeline.unet, config)
    wrapped.save_pretrained(tmp_path)
    expected = draw_theirs(pipeline)
    found = [
        draw_ours(sd, loras=[(path, 1.0)])
        for path in (tmp_path, tmp_path / "adapter_model.safetensors")
    ]
    assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(*found)
    # an alpha of 0 is a LoRA that does nothing, as peft has it
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 0}))
    assert torch.equal(draw_ours(sd, loras=[(tmp_path, 1.0)]), draw_ours(sd))
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(settings | {"init_lora_weights": "olora"})
    )
    with pytest.raises(UserError, match="olora"):
        draw_ours(sd, loras=[(tmp_path / "adapter_model.safetensors", 1.0)])


def test_folders_and_suffixes(sd, written, tmp_path):
    """diffusers' folder of a LoRA, and a suffix in capitals, are read; an embedding is a file."""
    for name in ("pytorch_lora_weights.safetensors", "A.SAFETENSORS"):
        save_file(written[0], tmp_path / name)
    for path in (tmp_path, tmp_path / "A.SAFETENSORS"):
        assert torch.equal(draw_ours(sd, loras=[(path, 1.0)]), written[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is a folder"):
        draw_ours(sd, loras=[(tmp_path / "empty", 1.0)])
    with pytest.raises(UserError, match="empty is a folder"):
        draw_ours(sd, embeddings=[tmp_path / "empty"])


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_initialisations_that_leave_the_base(sd, tmp_path, init):
    pipeline = with_adapter(sd, init_lora_weights=init)
    for name, value in pipeline.unet.named_parameters():
        if "lora_" in name:
            value.data += torch.randn_like(value) / 10
    pipeline.unet.save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert_close(draw_ours(sd, loras=[(file, 1.0)]), draw_theirs(pipeline), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def written(sd, tmp_path_factory):
    """(a LoRA of both networks as kohya writes it, what it draws, its file)."""
    pipeline, parts = open_pipeline(None, str(sd), None, CPU, amp="no"), {}
    for part, network in (
        ("unet", pipeline.model),
        ("text_encoder", pipeline.conditioning.encoder),
    ):
        torch.manual_seed(7)
        lora.inject(network, lora.find(network, "attention"), 3, 2.0)
        for *_, branch in lora.branches(network):
            nn.init.normal_(branch.up.weight, std=0.3)
        parts[part] = lora.state(network)
    file = tmp_path_factory.mktemp("lora") / "a.safetensors"
    adapters.write_kohya(file, parts)
    return load_file(file), draw_ours(sd, loras=[(file, 1.0)]), file


@pytest.fixture(scope="module")
def networks(sd):
    pipeline = open_pipeline(None, str(sd), None, CPU, amp="no")
    return {"unet": pipeline.model, "text_encoder": pipeline.conditioning.encoder}


@pytest.mark.parametrize("setting", [
    {"layer_replication": [[0, 1]]}, {"use_qalora": True}, {"use_dora": True},
    {"kasa_config": {"beta": 1}}, {"target_parameters": ["a.weight"]}, {"new_kind": {"x": 1}},
], ids=lambda s: next(iter(s)))  # fmt: skip
def test_settings_of_no_plain_lora(sd, written, tmp_path, setting):
    save_file(written[0], tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 2, "target_modules": ["to_q"]}
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(config))
    assert_close(draw_ours(sd, loras=[(tmp_path, 1.0)]), written[1], rtol=0, atol=0)
    file.write_text(json.dumps(config | setting))
    with pytest.raises(UserError, match=next(iter(setting))):
        draw_ours(sd, loras=[(tmp_path, 1.0)])


@pytest.mark.parametrize("short", [False, True], ids=["text_model", "short"])
@pytest.mark.parametrize("prefix", [
    "lora_te_", "lora_te1_", "lycoris_", "text_encoder.", "te.", "clip_l.",
    "text_encoders.clip_l.transformer.", "cond_stage_model.transformer.",
    "base_model.model.text_encoder.", "text_encoder.base_model.model.",
])  # fmt: skip
def test_prefixes_of_the_text_encoder(networks, written, tmp_path, prefix, short):
    """With and without text_model."""
    tensors, expected = written[0], adapters.read_lora(written[2], networks)
    assert len(expected["text_encoder"]) == 12
    renamed = {}
    for name, value in tensors.items():
        if name.startswith("lora_te_"):
            path = name.removeprefix("lora_te_").removeprefix("text_model_" if short else "")
            if "." in prefix:  # its modules' dots, which `_` stands for
                for module in ("text_model", "encoder", "layers", "0", "1", "2", "self_attn"):
                    path = path.replace(f"{module}_", f"{module}.", 1)
            name = prefix + path
        renamed[name] = value
    assert len(renamed) == len(tensors)
    save_file(renamed, tmp_path / "a.safetensors")
    found = adapters.read_lora(tmp_path / "a.safetensors", networks)
    assert [sorted(found[part]) for part in found] == [sorted(expected[part]) for part in found]
    for part, branches in expected.items():
        for name, low in branches.items():
            assert_close(found[part][name], low, rtol=0, atol=0)


LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("extra, named", [
    ({"lora_te_text_model_encoder_layers_11_mlp_fc1": "pair"}, "layers_11_mlp_fc1"),
    ({"lora_te2_text_model_encoder_layers_0_mlp_fc1": "pair"}, "Stable Diffusion XL"),
    ({"strange_te_text_model_encoder_layers_0_mlp_fc1": "pair"}, "strange_te"),
    ({"lora_unet_down_blocks_0_resnets_0_conv1.w_norm": 32}, "conv1 .*w_norm"),
    ({"lora_unet_down_blocks_0_resnets_0_norm.w_norm": 32}, "resnets_0_norm"),
    ({"lora_unet_conv_in.diff": 32, "lora_unet_conv_in.diff_b": 32}, "conv_in .*diff_b?"),
    ({"bundle_emb.tom.emb_params": 32}, "bundle_emb.tom"),
    ({"base_model.model.conv_out.bias": 4}, "conv_out.bias"),
    ({f"{LAYER}.bias": 4}, "attn1_to_q.bias"),
    ({"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "pair"}, "twice"),
    ({f"{LAYER}.lora_A.weight": (3, 32)}, f"down of '{LAYER}' twice"),
    ({"text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1": "pair"}, "Stable Diffusion XL"),
    ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (2, 64)}, "proj_in .* has its down; .*up"),
    ({"lora_unet_nothing.alpha": 1}, "nothing.alpha"),
    ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_mid.weight": 3}, "mlp.fc1 .* has its mid"),
])  # fmt: skip
def test_half_a_file_is_not_applied(networks, written, tmp_path, extra, named):
    added = {}
    for name, shape in extra.items():
        if shape == "pair":
            added[f"{name}.lora_down.weight"] = torch.ones(2, 32)
            added[f"{name}.lora_up.weight"] = torch.ones(32, 2)
        else:
            added[name] = torch.ones(shape)
    save_file(written[0] | added, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=named) as caught:
        adapters.read_lora(tmp_path / "a.safetensors", networks)
    assert "a.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_harmless_is_left_out(sd, written, tmp_path):
    """A buffer that no network reads; an alpha of a layer without a branch."""
    harmless = {
        "text_encoder.text_model.embeddings.position_ids": torch.arange(77)[None],
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(2.0),
    }
    save_file(written[0] | harmless, tmp_path / "a.safetensors")
    assert_close(
        draw_ours(sd, loras=[(tmp_path / "a.safetensors", 1.0)]), written[1], rtol=0, atol=0
    )


def test_a_text_encoders_part_for_a_model_without_one(sd, networks, written, tmp_path):
    with pytest.raises(UserError, match="U-Net, such as lora_te_"):
        adapters.read_lora(written[2], {"unet": networks["unet"]})
    alone = ("--sd_path", sd, *SAMPLE, "--lora_interpolate", written[2])
    broken = tmp_path / "b.safetensors"
    save_file(written[0] | {"lora_unet_x.diff": torch.ones(1)}, broken)
    done = script("sample.py", *alone, broken, cwd=tmp_path)
    assert done.returncode == 1 and "lora_unet_x" in done.stderr


# --- what a file is, its content says --------------------------------------------------------------


class Foreign:
    """A class of the file's own program, which is not here when the file is read."""

    def __init__(self):
        self.best = 3


Foreign.__module__ = "some_trainer.callbacks"


def world_state(tensors):
    """What training programs leave beside the weights: numpy's scalars, settings, callbacks."""
    import argparse
    import collections
    import pathlib

    return {
        "state_dict": {f"module.{k}": v for k, v in tensors.items()},
        "best": np.float64(0.5),
        "dtype": np.dtype("float32"),
        "array": np.arange(3),
        "args": argparse.Namespace(lr=1e-4, out=pathlib.Path("x")),
        "callbacks": {Foreign: {"best": Foreign()}},
        "seen": {1, 2},
        "counts": collections.defaultdict(int, {"a": 1}),
        "kinds": [str, range(3), frozenset("ab"), bytearray(b"x"), 1 << 3000],
        "history": collections.deque([1, 2]),
        "random": np.random.default_rng(),
        "waves": torch.ones(2, dtype=torch.complex64),
    }


def save_foreign(state, path, **options):
    modules = {name: type(sys)(name) for name in ("some_trainer", "some_trainer.callbacks")}
    modules["some_trainer.callbacks"].Foreign = Foreign
    sys.modules.update(modules)
    try:
        torch.save(state, path, **options)
    finally:
        for name in modules:
            del sys.modules[name]


def same_networks(sd, networks):
    """They have the weights of the folder's."""
    want = loader.load_sd(sd)
    for part, network in networks.items():
        expected = getattr(want, part).state_dict()
        found = network.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("a.pt", "safetensors"),
        ("a.ckpt", "safetensors"),
        ("a.SAFETENSORS", "safetensors"),
        ("a", "safetensors"),
        ("a.safetensors", "zip"),
        ("b", "zip"),
        ("a.bin", "legacy"),
        ("c.safetensors", "protocol 4"),
        ("d.pt", "protocol 5"),
    ],
)
def test_a_model_is_known_by_its_content(sd, tensors, tmp_path, name, kind):
    """Whatever its name, and whatever else a program left in it."""
    if kind == "safetensors":
        save_file(tensors, tmp_path / name)
    else:
        options = {"legacy": {"_use_new_zipfile_serialization": False}}
        options |= {f"protocol {n}": {"pickle_protocol": n} for n in (4, 5)}
        save_foreign(world_state(tensors), tmp_path / name, **options.get(kind, {}))
    found = diffusion.load(tmp_path / name, config=str(sd), amp="no")
    same_networks(sd, found.networks | {"vae": found.codec.vae})
    assert "some_trainer" not in sys.modules


def test_adapters_and_shards_are_known_by_their_content(sd, written, tmp_path):
    branches, expected, _ = written
    torch.save(branches, tmp_path / "a.safetensors")
    save_file(branches, tmp_path / "a.pt")
    numbers = {k: v.item() if k.endswith(".alpha") else v for k, v in branches.items()}
    torch.save({"lora": numbers, "step": 3}, tmp_path / "b.pt")
    for name in ("a.safetensors", "a.pt", "b.pt"):
        found = draw_ours(sd, loras=[(tmp_path / name, 1.0)])
        assert_close(found, expected, rtol=0, atol=0)
    torch.save(branches | {f"{LAYER}.alpha": np.float64(2)}, tmp_path / "c.pt")
    with pytest.raises(UserError, match=f"c.pt.*{LAYER}.alpha"):
        draw_ours(sd, loras=[(tmp_path / "c.pt", 1.0)])
    save_file({"emb_params": VECTORS}, tmp_path / "x.pt")
    torch.save({"emb_params": VECTORS}, tmp_path / "x.safetensors")
    for ending in ("pt", "safetensors"):
        found = embedding_files.read_embedding(tmp_path / f"x.{ending}", WIDTH)
        assert torch.equal(found["x"], VECTORS)
    shutil.copytree(sd, tmp_path / "sd")
    folder = tmp_path / "sd" / "unet"
    file = next(folder.glob("*.safetensors"))
    unet = load_file(file)
    file.unlink()
    torch.save(unet, folder / "1.safetensors")
    index = {"weight_map": dict.fromkeys(unet, "1.safetensors")}
    (folder / f"{file.name}.index.json").write_text(json.dumps(index))
    same_networks(sd, {"unet": loader.load_sd(tmp_path / "sd").unet})


STAND_INS = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "page": (b"\xef\xbb\xbf\n<!DOCTYPE html><title>404</title>", "web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
    "empty": (b"", "empty"),
    "text": (b"Access to model x is restricted.\n\x1b[31m", "Access to model x"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(99), "GGUF"),
    "zeros": (bytes(4096), "x00"),
    "pickle": (b"\x80\x04\x95" + bytes(99), "x80"),
    "compressed": (b"", "compressed zip file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*STAND_INS, "zip"])
def test_what_is_no_weights_is_named(sd, tmp_path, kind):
    """With each option that takes a file of weights, one line that names the file."""
    content, named = STAND_INS.get(kind, (None, "pictures/0.png"))
    for name in ("a.safetensors", "a.ckpt"):
        file = tmp_path / name
        if content is None:
            with zipfile.ZipFile(file, "w") as z:
                z.writestr("pictures/0.png", "x")
        elif kind == "compressed":
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
                z.writestr("pictures/0.png", "x" * 10**5)
        else:
            file.write_bytes(content)
        for read in (
            lambda: loader.load_sd(file, sd),
            lambda: loader.load_vae(file),
            lambda: diffusion.load(file, config=str(sd)),
            lambda: draw_ours(sd, loras=[(file, 1.0)]),
            lambda: draw_ours(sd, embeddings=[file]),
            lambda: checkpoint.load_weights(file),
        ):
            with pytest.raises(UserError) as caught:
                read()
            told = str(caught.value)
            assert str(file) in told and named in told and "\n" not in told and "\x1b" not in told


def test_config_files_that_are_pointers(sd, tmp_path):
    shutil.copytree(sd, tmp_path / "sd")
    for file in ("unet/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"):
        before = (tmp_path / "sd" / file).read_bytes()
        (tmp_path / "sd" / file).write_bytes(STAND_INS["pointer"][0])
        with pytest.raises(UserError, match=f"{file}.*git lfs pull"):
            loader.load_sd(tmp_path / "sd")
        (tmp_path / "sd" / file).write_bytes(b"")
        with pytest.raises(UserError, match=f"{file}.*empty"):
            loader.load_sd(tmp_path / "sd")
        (tmp_path / "sd" / file).write_bytes(before)


def test_vaes_of_a1111(sd, tensors, tmp_path):
    """vae.pt and .ckpt with what the VAE was trained with beside it, bare or not."""
    want = loader.load_sd(sd).vae.state_dict()
    prefix = "first_stage_model."
    bare = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    beside = {
        "loss.logvar": torch.ones(1),
        "loss.discriminator.main.0.weight": torch.ones(2, 2),
        "model_ema.decay": torch.tensor(0.9),
        "model_ema.encoderconv_inweight": torch.ones(2),
        "discriminator.main.0.weight": torch.ones(2),
    }
    shutil.copy(sd / "vae" / "config.json", tmp_path)
    for i, content in enumerate(
        (
            bare | beside,
            {"state_dict": bare | beside, "global_step": np.int64(3)},
            {f"{prefix}{k}": v for k, v in (bare | beside).items()},
            {f"module.{k}": v for k, v in (bare | beside).items()},
            {f"_orig_mod.module.{k}": v for k, v in bare.items()},
            {f"model.{k}": v for k, v in bare.items()},
        )
    ):
        for name in (f"{i}.vae.pt", f"{i}.ckpt", f"{i}.safetensors"):
            torch.save(content, tmp_path / name)
            found = loader.load_vae(tmp_path / name).state_dict()
            assert found.keys() == want.keys()
            assert all(torch.equal(found[k], want[k]) for k in want)


@pytest.mark.parametrize(
    "before",
    ["module.", "_orig_mod.", "_orig_mod.module.", "model.", "unet.", "model._orig_mod."],
)
def test_wrappers_of_training_are_not_in_the_names(sd, tmp_path, before):
    shutil.copytree(sd, tmp_path / "sd")
    for part in ("unet", "text_encoder"):
        file = next((tmp_path / "sd" / part).glob("*.safetensors"))
        content = {f"{before}{k}": v for k, v in load_file(file).items()}
        if part == "text_encoder":
            if not any("text_model." in k for k in content):
                content = {k.replace(before, f"{before}text_model."): v for k, v in content.items()}
            content["text_projection.weight"] = torch.ones(4, 4)
            content["logit_scale"] = torch.ones(())
            if before in ("model.", "unet.", "model._orig_mod."):
                content = {k: v for k, v in content.items() if k.startswith(before)}
        save_file(content, file)
    found = loader.load_sd(tmp_path / "sd")
    same_networks(sd, {part: getattr(found, part) for part in ("unet", "text_encoder")})


def test_names_that_are_there_with_and_without_a_wrapper(sd, tensors, tmp_path):
    torch.save(tensors | {f"module.{k}": v * 0 for k, v in tensors.items()}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="a.ckpt.*twice.*module"):
        loader.load_sd(tmp_path / "a.ckpt", sd)


def test_whole_models_and_programs_are_named(sd, tmp_path):
    """A pickled network is no weights by name; what calls the system is refused."""
    save_foreign(Foreign(), tmp_path / "model.pt")
    with pytest.raises(UserError, match="some_trainer.callbacks.Foreign"):
        loader.load_sd(tmp_path / "model.pt", sd)


# --- digests of what is written -------------------------------------------------------------------


def test_a_flipped_bit_in_what_is_written_is_refused_or_changes_nothing(tmp_path):
    """Of an adapter and an embedding: tensors and texts, wherever the bit is."""
    from diffusion.files import tensors as files

    branches = {
        "mid_block.attentions.0.proj_in": lora.LowRank(torch.ones(2, 8), torch.ones(8, 2), 4.0)
    }
    adapters.write_diffusers(tmp_path / "a.safetensors", {"unet": branches}, step="3")
    adapters.write_kohya(tmp_path / "b.safetensors", {"unet": branches})
    embedding_files.write_a1111(tmp_path / "c.safetensors", "<a>", torch.ones(2, 8))
    rng = random.Random(0)
    for name in ("a", "b", "c"):
        file = tmp_path / f"{name}.safetensors"
        data = file.read_bytes()
        want, about = files.read_safetensors(file)
        assert load_file(file).keys() == want.keys()  # other programs read it
        refused = 0
        for _ in range(150):
            bad = bytearray(data)
            bad[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(bad)
            try:
                found, texts = files.read_safetensors(file)
            except UserError:
                refused += 1
                continue
            assert found.keys() == want.keys() and about.items() <= texts.items()
            assert all(torch.equal(found[k], want[k]) for k in want)
        assert refused > 100


def test_files_that_other_programs_edited(tmp_path):
    """More texts are no damage; another text, or other tensors, are, and the text is named."""
    from safetensors import safe_open

    from diffusion.files import tensors as files

    file = tmp_path / "a.safetensors"
    files.write_tensors(file, {"a": torch.ones(2)}, {"note": "mine"})
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    save_file({"a": torch.ones(2)}, file, metadata=about | {"ss_tag": "new"})
    assert files.read_safetensors(file)[1]["ss_tag"] == "new"
    save_file({"a": torch.ones(2)}, file, metadata=about | {"note": "theirs"})
    with pytest.raises(UserError, match=f"note.*{files.DIGEST}"):
        files.read_tensors(file)
    about.pop(files.DIGEST)
    save_file({"a": torch.ones(2)}, file, metadata=about | {"note": "theirs"})
    assert files.read_safetensors(file)[1]["note"] == "theirs"


# --- the study ------------------------------------------------------------------------------------


def test_the_study_hands_on_what_a_file_holds(both, sd, captioned, tmp_path):
    """--sd_weights and --objective reach the base, train.py and sample.py; a study of before the
    options is the same one."""
    from diffusion.study import runner
    from diffusion.study import study_folder as folder
    from diffusion.study.__main__ import parse

    shared = [
        "--data",
        str(captioned.parent),
        "--sd_path",
        str(both / "a.ckpt"),
        "--sd_config",
        str(sd),
    ]
    plain = parse(shared)[0]
    other = parse([*shared, "--sd_weights", "ema", "--objective", "v"])[0]
    assert runner.base_arguments(plain) == [
        f"--sd_path={both / 'a.ckpt'}",
        f"--config={sd}",
    ]
    assert runner.base_arguments(other)[2:] == ["--weights=ema", "--objective=v"]
    assert runner.base_arguments(other, "sd_")[2:] == ["--sd_weights=ema", "--objective=v"]
    known = folder.describe(plain)["settings"]
    # the plain weights are new: studies of before took this file's averaged ones
    assert known["sd_weights"] == "raw" and "objective" not in known
    found = folder.describe(other)["settings"]
    assert found["objective"] == "v" and "sd_weights" not in found
    with pytest.raises(UserError, match="--objective"):
        parse(["--data", str(captioned), "--load_path", "x", "--objective", "v"])


@pytest.mark.parametrize("name", ["emb_params", "a.b.c", "." * 3000], ids=["bare", "chain", "dots"])
def test_one_tensor_of_any_name_is_no_vae(tmp_path, name):
    """Prefixes that all names share are taken away, but not without end."""
    save_file({name: torch.zeros(2, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="a.safetensors"):
        loader.load_vae(tmp_path / "a.safetensors")
