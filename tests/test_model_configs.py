"""Configurations of the world: wrong types, sizes without bounds, and what schedulers leave out."""

import inspect
import json
import shutil
import time
import warnings

import pytest
import tiny_sd
import torch
from helpers import CPU
from torch import nn
from torch.testing import assert_close

from diffusion import UserError
from diffusion.config import Config
from diffusion.evaluation.clip_score import open_clip
from diffusion.files import checkpoint
from diffusion.files import sd_files as loader
from diffusion.files.sd_files import CLASSES, read_scheduler
from diffusion.sampling.load import load, open_pipeline, schedule_of
from diffusion.sampling.pipeline import Pipeline

FORGED = "\x1b[31m\nerror: forged" * 50
WRONG = [None, "x", [], {}, -1, 1e30, True, [[[{}]]], 10**9, float("nan"), FORGED, [1, "a"], 0.5]
MORE = {  # keys that the tiny model's files leave out
    "scheduler/scheduler_config.json": dict.fromkeys(
        (
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "rescale_betas_zero_snr",
            "thresholding",
        ),
        False,
    )
    | {"timestep_spacing": "leading", "prediction_type": "epsilon", "trained_betas": None},
    "unet/config.json": {"num_class_embeds": None, "class_embed_type": None},
    "vae/config.json": {"shift_factor": None},
    "text_encoder/config.json": {},
    "model_index.json": {},
    "tokenizer/tokenizer_config.json": {"pad_token": "<|endoftext|>", "model_max_length": 77},
    "tokenizer/added_tokens.json": {"<x>": 514},
}


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    tiny_sd.save_folder(folder)
    return folder


@pytest.fixture
def change(sd):
    """Write a file of the folder with other values; what was there comes back at the end."""
    saved = {}

    def write(name, values):
        file = sd / name
        saved.setdefault(file, file.read_bytes() if file.exists() else None)
        own = json.loads(saved[file]) if saved[file] else {}
        file.write_text(json.dumps({**MORE.get(name, {}), **own, **values}))
        return file

    yield write
    for file, content in saved.items():
        file.write_bytes(content) if content is not None else file.unlink()


def told(read) -> str | None:
    """The one bounded line with which something is refused; None if it is read."""
    try:
        read()
    except UserError as error:
        text = str(error)
        assert "\n" not in text and "\x1b" not in text and len(text) < 700, text
        return text
    return None


def draw(folder):
    pipeline = open_pipeline(None, str(folder), None, CPU, amp="no")
    pipeline.sample([0], steps=1, prompts=["a"], guidance_scale=1.0)


def check_wrong_types(sd, change, name, keys, values):
    """Each is read as well as before, or one line names the file and the key."""
    refused = 0
    for key in keys:
        for value in values:
            file = change(name, {key: value})
            text = told(lambda: draw(sd))
            refused += text is not None
            # a whole number that is possible is refused by the weights or by the vocabulary
            told_by = ("does not fit", "tokens need ids")
            fits = type(value) is int and value > 0 and any(t in (text or "") for t in told_by)
            assert text is None or fits or (file.name in text and key in text), (key, value, text)
    return refused


BRIEF = {
    "unet/config.json": "norm_eps freq_shift sample_size attention_head_dim num_class_embeds down_block_types",  # fmt: skip
    "vae/config.json": "scaling_factor shift_factor norm_num_groups block_out_channels layers_per_block",  # fmt: skip
    "text_encoder/config.json": "layer_norm_eps num_attention_heads hidden_size architectures max_position_embeddings",  # fmt: skip
    "scheduler/scheduler_config.json": "beta_start trained_betas timestep_spacing steps_offset num_train_timesteps _class_name use_karras_sigmas",  # fmt: skip
    "tokenizer/tokenizer_config.json": "pad_token model_max_length",
    "tokenizer/added_tokens.json": "<x>",
}


@pytest.mark.parametrize("name", BRIEF)
def test_values_of_wrong_types(sd, change, name):
    values = [None, {}, -1, True, FORGED]
    keys = BRIEF[name].split()
    assert check_wrong_types(sd, change, name, keys, values) > len(keys)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_every_value_of_wrong_types(sd, change, name):
    file = change(name, {})
    refused = check_wrong_types(sd, change, name, json.loads(file.read_text()), WRONG)
    assert refused or name == "model_index.json"


# --- CLIP for --clip ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from diffusion.files.tokenizer_files import save_tokenizer
    from diffusion.models.build import build
    from diffusion.models.configs import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
    from diffusion.models.tokenizer import byte_level

    folder = tmp_path_factory.mktemp("clip")
    vocabulary = byte_level(20)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    text = CLIPTextConfig(**sizes, vocab_size=len(vocabulary), max_position_embeddings=20, eos_token_id=vocabulary.eos_id)  # fmt: skip
    model = build("clip", CLIPConfig(text, CLIPVisionConfig(**sizes, image_size=8, patch_size=4), 8))  # fmt: skip
    loader.save_part(model, folder, "model.safetensors")
    save_tokenizer(vocabulary, folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    return folder


def test_clip_folders_of_wrong_types(clip, tmp_path):
    shutil.copytree(clip, tmp_path / "clip")
    open_clip(tmp_path / "clip", CPU)
    file = tmp_path / "clip" / "config.json"
    good = json.loads(file.read_text())
    cases = [(key, good | {key: value}) for key in ("text_config", "projection_dim") for value in WRONG[1::2]]  # fmt: skip
    for part, key in (("vision_config", "patch_size"), ("vision_config", "image_size"),
                      ("text_config", "num_hidden_layers"), ("vision_config", "layer_norm_eps")):  # fmt: skip
        cases += [(key, good | {part: good[part] | {key: value}}) for value in (0, *WRONG[::2])]
    for key, config in cases:
        file.write_text(json.dumps(config))
        text = told(lambda: open_clip(tmp_path / "clip", CPU))
        assert text is None or key in text or "does not fit" in text, (key, text)
        assert text is not None or config["text_config"] in ([], {}) or key == "layer_norm_eps"
    for value in WRONG:  # shown where there is no vision tower
        file.write_text(json.dumps({"model_type": value}))
        assert "vision tower" in told(lambda: open_clip(tmp_path / "clip", CPU))
    file.write_text(json.dumps(good))
    for key in ("image_mean", "image_std"):
        for value in (0, [0, 0], ["a"] * 3, {}, [1e30] * 3, FORGED, None):
            other = tmp_path / "clip" / "preprocessor_config.json"
            other.write_text(json.dumps({key: value}))
            assert key in told(lambda: open_clip(tmp_path / "clip", CPU))


# --- sizes ----------------------------------------------------------------------------------------

HUGE = [
    ("unet/config.json", {"layers_per_block": 1000}),
    ("unet/config.json", {"layers_per_block": 10**15}),
    ("unet/config.json", {"block_out_channels": [8] * 10**5, "down_block_types": ["CrossAttnDownBlock2D"] * 10**5, "up_block_types": ["CrossAttnUpBlock2D"] * 10**5}),
    ("unet/config.json", {"block_out_channels": [8] * 16, "layers_per_block": 900, "norm_num_groups": 8, "down_block_types": ["CrossAttnDownBlock2D"] * 16, "up_block_types": ["CrossAttnUpBlock2D"] * 16}),
    ("unet/config.json", {"block_out_channels": [1 << 24, 1 << 24]}),
    ("unet/config.json", {"cross_attention_dim": 1 << 24}),
    ("unet/config.json", {"num_class_embeds": 1 << 24}),
    ("unet/config.json", {"sample_size": 1 << 24}),
    ("unet/config.json", {"sample_size": [8, 1 << 20]}),
    ("vae/config.json", {"layers_per_block": 1000}),
    ("vae/config.json", {"latent_channels": 1 << 24}),
    ("vae/config.json", {"block_out_channels": [8] * 30}),
    ("text_encoder/config.json", {"num_hidden_layers": 1000}),
    ("text_encoder/config.json", {"vocab_size": 1 << 24, "max_position_embeddings": 1 << 24}),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 999_999}),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}),
]  # fmt: skip


def costs_nothing(read) -> str:
    """Refused within seconds and 100 MB."""
    hostile = pytest.importorskip("hostile")
    hostile.forget_peak()
    before, began = hostile.peak_memory(), time.monotonic()
    text = told(read)
    assert text is not None and torch.is_grad_enabled()
    assert hostile.peak_memory() - before < 100 << 20 and time.monotonic() - began < 10
    return text


@pytest.mark.parametrize("name, values", HUGE)
def test_sizes_of_no_network(sd, change, name, values):
    change(name, values)
    costs_nothing(lambda: draw(sd))


@pytest.mark.parametrize("values", [
    {"dim_mults": [1] * 10**5}, {"dim_mults": [1, 1 << 60]}, {"dim_mults": ["x"]}, {"dim_mults": [True]},
    {"unet_dim": 1 << 40}, {"unet_dim": 65_536, "dim_mults": [1] * 9}, {"heads": 1 << 50}, {"heads": 1 << 20},
    {"image_size": 1 << 40}, {"image_size": 16_384}, {"time_steps": 1 << 40}, {"unknown\x1b[31m": 1},
    {"mode": FORGED}, {"objective": ["eps"]}, {"text_dim": (1 << 61) - 1}, {"text_layers": 10**9},
])  # fmt: skip
def test_models_of_no_network(model, tmp_path, values):
    state = checkpoint.read(model)
    state["config"] = state["config"] | values
    torch.save(state, tmp_path / "a.pt")
    text = costs_nothing(lambda: load(tmp_path / "a.pt"))
    assert "a.pt" in text or f"{values.get('image_size'):,}" in text


def test_sizes_in_a_latent_models_file(scratch, tmp_path):
    state = checkpoint.read(scratch)
    state["config"] = state["config"] | {"vae": checkpoint.load_weights(scratch)[1].vae}
    good = state["networks"]
    assert load(scratch).reads_prompts
    cases = [None, [], {"unet": 3, "text": {}}, {"unet": {}}, good | {"text": 5}]
    cases += [good | {"unet": good["unet"] | {"layers_per_block": n}} for n in (1000, "x", None, 1e30)]  # fmt: skip
    cases += [good | {"text": good["text"] | {"max_position_embeddings": n}} for n in (1 << 24, 3)]
    for networks in cases:
        torch.save(state | {"networks": networks}, tmp_path / "a.pt")
        assert "a.pt" in costs_nothing(lambda: load(tmp_path / "a.pt"))
    long = state | {"config": state["config"] | {"text_length": 65_536}}
    torch.save(long, tmp_path / "a.pt")
    assert "65536" in costs_nothing(lambda: load(tmp_path / "a.pt"))


# --- schedulers -----------------------------------------------------------------------------------


def pipeline_of(folder, config):
    """A pipeline with the scheduler of a folder that holds nothing else."""
    file = folder / "scheduler" / "scheduler_config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(config))
    scheduler = read_scheduler(folder)
    return Pipeline(Config(), nn.Identity(), schedule_of(scheduler), scheduler=scheduler)


SOLVERS = ("DPMSolver", "DEIS", "UniPC", "SASolver")
VARIANTS = [
    {}, {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading"}, {"timestep_spacing": "linspace"},
    {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"trained_betas": [0.001 * i for i in range(1, 101)], "num_train_timesteps": 100},
]  # fmt: skip


@pytest.mark.parametrize("kind", [k for k in CLASSES if k != "DPMSolverSDEScheduler"])
def test_timesteps_are_those_of_each_class(tmp_path, kind):
    """Also where the file leaves the spacing and the betas out, as those of 2022 do."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers (tests/requirements.txt)")
    theirs = getattr(diffusers, kind)
    known = inspect.signature(theirs.__init__).parameters
    for variant in VARIANTS:
        # Stable Diffusion's pipelines in diffusers set steps_offset to 1 whatever the file says
        config = {"_class_name": kind, "steps_offset": 1} | variant
        if not variant.keys() <= known.keys():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = theirs.from_config({k: v for k, v in config.items() if k in known})
            scheduler.set_timesteps(10)
        ours = pipeline_of(tmp_path, config)
        exact = scheduler.betas.double()
        if not variant.get("rescale_betas_zero_snr"):
            assert_close(ours.schedule.alpha_bar, (1 - exact).cumprod(0), rtol=1e-5, atol=1e-6)
        table = ours.table("dpmpp_2m" if kind.startswith(SOLVERS) else "ddim", 10)
        seen = scheduler.timesteps[scheduler.timesteps.isfinite()]
        whole = set(map(round, seen.tolist()))
        if kind.startswith(("PNDM", "KDPM2")):  # which visit others between
            assert all(any(abs(t - w) <= 1 for w in whole) for t in table.t.tolist())
            assert abs(max(whole) - table.t[0]) <= 1
        else:
            got = scheduler.timesteps.double().unique().flip(0)
            # exponential ones of solvers are cut to whole numbers there; linspace of Euler is real
            slack = 1.0 if variant.get("use_exponential_sigmas") else 0.51
            assert_close(table.t, got, rtol=0, atol=slack)


def test_what_is_not_taken_is_named_once(sd, change, capsys):
    name = "scheduler/scheduler_config.json"
    for values, words in [
        ({"thresholding": True, "use_beta_sigmas": True}, ["thresholding", "use_beta_sigmas"]),
        ({"_class_name": "EulerDiscreteScheduler", "sigma_min": 0.1}, ["sigma_min"]),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, ["solver_order"]),
        ({"_class_name": "LCMScheduler"}, ["LCMScheduler"]),
        ({"_class_name": "MyScheduler", "some_new_setting": [2]}, ["MyScheduler", "some_new_setting"]),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "solver_order": 2}, ["bh2"]),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_type": "midpoint"}, []),
        ({"use_karras_sigmas": True, "clip_sample_range": 1.0}, []),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, ["timestep_spacing"]),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True, "rescale_betas_zero_snr": True,
          "prediction_type": "v_prediction"}, ["rescale_betas_zero_snr"]),
        ({"_class_name": "DPMSolverMultistepScheduler", "lower_order_final": False}, ["lower_order_final"]),
        ({"skip_prk_steps": False}, ["skip_prk_steps"]),
        ({"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, ["predict_x0"]),
    ]:  # fmt: skip
        change(name, values)
        open_pipeline(None, str(sd), None, CPU)
        lines = [x for x in capsys.readouterr().out.splitlines() if "not taken" in x]
        assert len(lines) == bool(words) and all(word in lines[0] for word in words)
    change(name, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    assert "rescale_betas_zero_snr" in told(lambda: draw(sd))
    for values, word in [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
    ]:
        change(name, values)
        text = told(lambda: open_pipeline(None, str(sd), None, CPU))
        assert word in text and "scheduler_config.json" in text
