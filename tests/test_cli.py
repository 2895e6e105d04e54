"""The command line: defaults, presets, mistakes, --help and --dry_run."""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT, script

from diffusion import UserError, config
from diffusion.commands import sample, train, visualize
from diffusion.config import PRESET_OF_DATA, PRESETS, Config, Parser, config_from_args
from diffusion.process import objective, samplers, schedule


def parse(text: str) -> Config:
    return train.parse(text.split())[0]


def test_choices_are_the_tables():
    """The configuration does not import the process, so that its lists could go stale."""
    choices = {f.name: set(f.metadata["choices"]) for f in fields(Config)}
    assert choices["schedule"] == set(schedule.SCHEDULES)
    assert choices["objective"] == set(objective.OBJECTIVES)
    assert choices["loss"] == set(objective.LOSSES)
    assert choices["sampler"] == set(samplers.SAMPLERS)


def test_defaults_presets_and_what_was_given():
    assert parse("") == config_from_args({}, "toy")
    assert parse("--train_steps 7") == config_from_args({"train_steps": 7}, "toy")
    assert parse("--data some/folder") == Config(data="some/folder")
    faces = parse("--mode pixel --data anime_faces")
    assert faces.image_size == 128 and faces.epochs == 300 and faces.batch_size % 8 == 0
    assert parse("--data anime_faces --preset none") == Config(data="anime_faces")
    assert parse("--data anime_faces --train_steps 5").epochs is None
    assert (
        parse("--preset pokemon64").lr_warmup_steps == 500
        and parse("--preset pokemon64").epochs == 400
    )
    assert parse("--preset afhq_cat32 --unet_dim 32").unet_dim == 32
    assert parse("--data_path x --dim_mults 1,2 --no_flip").dim_mults == (1, 2)
    assert not parse("--no_flip").flip and parse("--flip").flip and not parse("--no_cache").cache
    assert set(PRESET_OF_DATA.values()) <= set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_differ_from_the_defaults(preset):
    given = {"data": "some/folder"} if PRESETS[preset].get("data", "") is None else {}
    made, plain = config_from_args(given, preset), Config()
    for name, value in (PRESETS[preset] | given).items():
        assert getattr(made, name) == value
        assert name == "data" or value != getattr(plain, name) or name in ("image_size", "batch_size", "unet_dim",
            "learning_rate"), f"{preset} repeats the default of {name}"  # fmt: skip


@pytest.mark.parametrize("text, named", [
    ("--batchsize 3", "--batch_size"),
    ("--unet_dims=3", "--unet_dim"),
    ("--schedule cosin", "cosine"),
    ("--amp fp8", "auto, no, bf16, fp16"),
    ("--preset cat", "none, toy"),
    ("--preset anime_sd15", "--data"),
    ("--batch_size x", "--batch_size"),
    ("--batch_size 0", "batch_size is 0"),
    ("--unet_dim 7", "unet_dim is 7"),
    ("--dim_mults 1,0", "dim_mults is (1, 0)"),
    ("--ema_decay 1", "ema_decay is 1.0"),
    ("--epochs 3 --train_steps 4", "--epochs"),
    ("--zero_snr --objective eps", "--objective v or x0"),
    ("--streaming", "hf:owner/name"),
    ("--time_steps 1", "time_steps is 1"),
    ("--rank_timeout 0", "rank_timeout is 0.0"),
    ("--learning_rate -1", "learning_rate is -1.0"),
])  # fmt: skip
def test_mistakes_name_the_option_and_the_value(text, named, capsys):
    with pytest.raises((UserError, SystemExit)) as caught:
        parse(text)
    assert named in str(caught.value) + capsys.readouterr().err


def parser_of(command, monkeypatch) -> Parser:
    """The parser that a command makes."""
    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", lambda self, *_: setattr(patch, "seen", self) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command.parse([])
        return patch.seen


@pytest.mark.parametrize("command", [train, sample, visualize])
def test_every_help_text_names_its_subject(command, monkeypatch):
    """No pronoun that means another option's line, no fragment such as "of AdamW"."""
    for action in parser_of(command, monkeypatch)._actions:
        if action.help == argparse.SUPPRESS:
            continue
        first = action.help.split()[0]
        assert len(action.help.split()) > 1, action.option_strings
        assert first not in ("of", "its", "their", "for", "in", "inside", "after", "how"), action
        assert not re.search(r"\b(told|anew|averaged|goes on)\b", action.help), action


def test_help_needs_no_torch():
    """--help is there at once."""
    code = (
        "import sys; from diffusion.commands import train, sample, visualize\n"
        "for command in (train, sample, visualize):\n"
        "    try: command.parse(['--help'])\n"
        "    except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"--{name}" in done.stdout for name in ("preset", "sampler", "html"))


def test_json_round_trip():
    made = Config(dim_mults=(1, 3), epochs=2.5)
    assert Config.from_dict(json.loads(made.to_json())) == made
    with pytest.raises(UserError, match="unknown fields: colour"):
        Config.from_dict({"colour": 1})
    with pytest.raises(UserError, match="batch_size is '8'"):
        Config.from_dict({"batch_size": "8"})


def test_differences_leave_out_what_does_not_change_the_mathematics():
    a, b = Config(), Config(train_steps=5, log_every=3, keep_last=9, seed=1, save_folder="x")
    assert a.differences(b) == {"seed": (0, 1)}


def test_help_lists_every_option_in_groups(tmp_path):
    done = script("train.py", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for f in fields(Config):
        assert f"--{f.name}" in done.stdout or f"--no_{f.name}" in done.stdout
    assert all(f"\n{section}:" in done.stdout for section in config.SECTIONS.values())
    assert "(default: 64)" in done.stdout and "--data_path" in done.stdout


def test_dry_run_tells_and_writes_nothing(tmp_path, faces):
    done = script("train.py", "--data", faces, "--image_size", 16, "--unet_dim", 8, "--dry_run",
                  "--cache_dir", tmp_path / "cache", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for told in (
        '"unet_dim": 8',
        "118 images to train on",
        "parameters",
        "GFLOP",
        "memory: about",
        "100,000 steps",
    ):
        assert told in done.stdout
    assert not (tmp_path / "results").exists()


def test_dry_run_counts_right():
    """Parameters and FLOPs of one convolution's worth of network, by hand."""
    from diffusion.training.dry_run import forward_cost

    made = Config(unet_dim=8, dim_mults=(1,), heads=2, image_size=8)
    parameters, trained, flops, kept = forward_cost(made, 0)
    from diffusion.sampling.load import build_network

    assert parameters == trained == sum(p.numel() for p in build_network(made, 0).parameters())
    n = 64  # positions
    convs = 2 * n * 9 * (3 * 8 + 2 * 8 * 8 * 4 + 3 * (16 * 8 + 8 * 8)) + 2 * n * (
        3 * 16 * 8 + 8 * 3
    )
    attention = 3 * (2 * n * 8 * 96 + 4 * n * n * 32 + 2 * n * 32 * 8)
    embeddings = 2 * (8 * 32 + 32 * 32 + 7 * 32 * 16)
    assert flops == convs + attention + embeddings
    assert kept > 7 * 2 * n * 8 * 4


def test_dry_run_counts_the_same_with_every_kernel_of_attention():
    """What torch chooses depends on the processor: FLOPs and bytes for backward must not."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from diffusion.training.dry_run import forward_cost

    made = Config(unet_dim=8, dim_mults=(1,), heads=2, image_size=8)
    costs = set()
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel):
            costs.add(forward_cost(made, 0))
    assert len(costs) == 1


def test_the_readme_tells_the_truth():
    """Options and presets named in the README exist; the files of its table do too."""
    text = (ROOT / "README.md").read_text()
    from diffusion.commands import sample, visualize
    from diffusion.evaluation import __main__ as metrics
    from diffusion.study.__main__ import parse as study_parse

    known = {f"--{f.name}" for f in fields(Config)} | {f"--no_{f.name}" for f in fields(Config)}
    known |= {"--data_path", "--preset", "--dry_run", "--help", "--nproc_per_node", "--limit"}
    known |= {f"--{name}" for name in vars(study_parse(["--load_path", "X", "--data", "Y"])[0])}
    for parsed in (sample.parse([]), visualize.parse([]), metrics.parse(["REAL", "FAKE"])):
        known |= {f"--{name}" for name in vars(parsed)}
    assert set(re.findall(r"(?<!-)--[a-z_]+", text)) <= known
    for name in re.findall(r"`(diffusion/[\w/]+\.py|docs/\w+\.md|\w+\.py)`", text):
        assert (ROOT / name).exists() or list((ROOT / "diffusion").rglob(name)), name
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (ROOT / picture).is_file(), picture
    for preset in re.findall(r"--preset (\w+)", text):
        assert preset in config.PRESETS or preset == "none"


def test_the_mathematics_page_names_what_exists():
    text = (ROOT / "docs" / "math.md").read_text()
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    code = "\n".join(p.read_text() for p in (ROOT / "diffusion").rglob("*.py"))
    for name in set(re.findall(r"`(test_\w+)`", text)):
        assert f"def {name}(" in tests, name
    for name in set(re.findall(r"`\w+\.(\w+)`", text)):
        assert f"def {name}(" in code or f"class {name}(" in code or f"class {name}:" in code, name
