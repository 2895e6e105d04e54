"""The command line: defaults, presets, mistakes, --help and --dry_run."""

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from dataclasses import fields

import pytest
from conftest import ROOT, script

from diffusion import UserError, config
from diffusion.commands import sample, train, visualize
from diffusion.config import PRESET_OF_DATA, PRESETS, Config, Parser, config_from_args
from diffusion.process import names, objective, samplers, schedule
from diffusion.training import finetune
from diffusion.training.finetune_config import resolve_config


def parse(text: str) -> Config:
    return train.parse(text.split())[0]


def test_choices_are_the_tables():
    """--help imports no torch: names.py lists what the tables have functions for."""
    choices = {f.name: f.metadata["choices"] for f in fields(Config)}
    assert choices["path"] == names.PATHS and choices["noise_dist"] == names.NOISE_DISTS
    assert choices["schedule"] == names.SCHEDULES == tuple(schedule.SCHEDULES)
    assert choices["objective"] == choices["loss_space"] == tuple(objective.OBJECTIVES)
    assert choices["loss"] == names.LOSSES == tuple(objective.LOSSES)
    assert choices["sampler"] == (*samplers.MAKERS, *names.ALIASES)
    assert tuple(names.SAMPLERS) == tuple(samplers.MAKERS)
    assert names.SPACINGS == tuple(schedule.SPACINGS)
    assert choices["adapter"] == ("none", *finetune.ADAPTERS)


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
    ("--zero_snr --objective eps", "--objective v, x0 or flow"),
    ("--time_steps 1", "time_steps is 1"),
    ("--rank_timeout 0", "rank_timeout is 0.0"),
    ("--learning_rate -1", "learning_rate is -1.0"),
])  # fmt: skip
def test_mistakes_name_the_option_and_the_value(text, named, capsys):
    with pytest.raises((UserError, SystemExit)) as caught:
        parse(text)
    assert named in str(caught.value) + capsys.readouterr().err


@pytest.mark.parametrize("command", [train, sample, visualize])
def test_names_on_the_command_line_are_shown_on_one_line(command, capsys):
    with pytest.raises(SystemExit):
        command.parse(["--\x1b[31mfoo\nerror: forged"])
    said = capsys.readouterr().err
    assert "\x1b" not in said and said.count("\n") == 1 and "foo" in said


@pytest.mark.parametrize("preset", ["none", None])
def test_a_mistyped_model_is_said_before_what_it_needs(preset):
    parsed = train.parse(
        ["--mode", "latent", "--sd_path", "owner/name"] + ["--preset", "none"][: 2 * bool(preset)]
    )
    with pytest.raises(UserError, match="--sd_path owner/name does not exist.*hf:owner/name"):
        resolve_config(*parsed[:2])


def test_a_rank_beyond_every_layer_is_refused():
    with pytest.raises(UserError, match="rank is 100000"):
        parse("--adapter lora --rank 100000 --load_path x")


@pytest.mark.parametrize("command, option", [
    (train, "--save_folder"), (train, "--data"), (train, "--load_path"), (sample, "--sd_path"), (visualize, "--vae"),
])  # fmt: skip
def test_an_unset_variable_is_no_path(command, option, capsys):
    with pytest.raises(SystemExit):
        command.parse([option, ""])
    assert re.search(rf"{option}\S*: is empty", capsys.readouterr().err)


def test_a_path_with_a_line_end_begins_no_second_error():
    def main():
        raise UserError("x\nerror: forged\x1b is missing")

    with pytest.raises(SystemExit) as caught:
        config.run_script(main)
    lines = caught.value.code.split("\n")
    assert [line.startswith("error: ") for line in lines] == [True, False]
    assert "\x1b" not in lines[1]


def test_streams_are_of_hub_sets():
    with pytest.raises(UserError, match="--streaming.*hf:owner/name"):
        resolve_config(parse("--streaming"))


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


PROGRAMS = [
    path.relative_to(ROOT)
    for folder in ("diffusion", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "Parser(" in path.read_text()
    if 'if __name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("path", PROGRAMS, ids=str)
def test_every_program_explains_itself(path, monkeypatch, capsys):
    """argparse formats its texts only here: a per cent sign in one ends --help with an error."""
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [str((ROOT / path).parent), *sys.path])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))  # benchmarks have a common.py
    name = ".".join(path.with_suffix("").parts).removesuffix(".__main__")
    with pytest.raises(SystemExit) as end, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that a module is imported already
        if path.parts[0] == "diffusion":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / path), run_name="__main__")
    assert end.value.code in (0, None)
    assert "usage:" in capsys.readouterr().out


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


def known_options() -> set[str]:
    """The options of every program here, and those of others' that the pages name."""
    from diffusion.evaluation import __main__ as metrics
    from diffusion.study.__main__ import parse as study_parse

    known = {f"--{f.name}" for f in fields(Config)} | {f"--no_{f.name}" for f in fields(Config)}
    known |= {f"--{name}" for name in vars(study_parse(["--load_path", "X", "--data", "Y"])[0])}
    for parsed in (sample.parse([]), visualize.parse([]), metrics.parse(["REAL", "FAKE"])):
        known |= {f"--{name}" for name in vars(parsed)}
    for program in PROGRAMS:  # those whose options are read in main
        known |= set(re.findall(r'"(--[a-z_]+)', (ROOT / program).read_text()))
    # of torchrun, Slurm, pip and pytest
    known |= set("--nproc_per_node --nnodes --rdzv_backend --rdzv_endpoint --rdzv_id --max_restarts "
                 "--shutdown_timeout --no --index --kill --ntasks --cpus --gpus --nodes --requeue --signal --open".split())  # fmt: skip
    known |= {"--lr", "--output_dir"}  # which are errors that say the name here
    return known | {"--help", "--preset", "--dry_run", "--data_path"}


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "log.md"], ids=lambda p: p.name)
def test_the_pages_tell_the_truth(page):
    """Options and presets that README and docs name exist, and files; log.md tells of the past."""
    text = re.sub(r"`hf [^`]*`", "", page.read_text())  # the hub's own program
    unknown = set(re.findall(r"(?<![\w<!-])--[a-z_]+", text)) - known_options()
    assert not unknown
    for name in re.findall(r"`(diffusion/[\w/]+\.py|docs/\w+\.\w+|tests/\w+\.\w+|\w+\.py)`", text):
        assert (ROOT / name).exists() or list((ROOT / "diffusion").rglob(name)), name
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (page.parent / picture).is_file(), picture
    for joined in re.findall(r"--preset ([\w,]+)", text):
        assert set(joined.split(",")) <= {*config.PRESETS, "none"}


def test_the_mathematics_page_names_what_exists():
    text = (ROOT / "docs" / "math.md").read_text()
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    code = "\n".join(p.read_text() for p in (ROOT / "diffusion").rglob("*.py"))
    for name in set(re.findall(r"`(test_\w+)`", text)):
        assert f"def {name}(" in tests, name
    for name in set(re.findall(r"`\w+\.(\w+)`", text)):
        made = rf"^ *(def {name}\(|class {name}[(:]|{name}\b.* = )"
        assert re.search(made, code, re.M), name


# --- what people type who come from elsewhere -----------------------------------------------------


@pytest.mark.parametrize("command, typed, named", [
    (train, "--lr 1e-4", "--learning_rate"),
    (train, "--output_dir out", "--save_folder"),
    (train, "--resolution=512", "--image_size"),
    (train, "--max_train_steps 10", "--train_steps"),
    (train, "--train-batch-size 4", "--batch_size"),
    (train, "--num_train_epochs 4", "--epochs"),
    (train, "--pretrained_model_name_or_path sd", "--sd_path"),
    (train, "--instance_data_dir dog", "--data"),
    (train, "--mixed_precision fp16", "--amp"),
    (train, "--gradient_accumulation_steps 2", "--grad_accum"),
    (train, "--gradient_checkpointing", "--checkpointing"),
    (train, "--network_dim 8", "--rank"),
    (train, "--num_inference_steps 8", "--sample_steps"),
    (train, "--resume", "--save_folder"),
    (train, "--learning-rate 1", "--learning_rate"),
    (train, "--max_train_step 10", "--train_steps"),
    (train, "--num_train_steps 5", "--train_steps"),
    (train, "--lora", "--adapter"),
    (sample, "--from-file a.txt", "--prompt @FILE"),
    (sample, "--gpu 0", "--device"),
    (sample, "--num_inference_steps 8", "--steps"),
    (sample, "--ckpt sd.ckpt", "--sd_path or --load_path"),
    (sample, "--outdir out", "--save_folder"),
    (sample, "--n_samples 3", "--num_images"),
    (sample, "--H 512", "--height"),
    (sample, "--W 512", "--width"),
    (sample, "--scale 7", "--guidance_scale"),
    (visualize, "--cfg_scale 7", "--guidance_scale"),
])  # fmt: skip
def test_the_names_of_other_programs_are_known(command, typed, named, capsys):
    with pytest.raises(SystemExit):
        command.parse(typed.split())
    said = capsys.readouterr().err
    assert said.startswith("error: ") and typed.split()[0] in said
    assert re.search(rf"(here it is|did you mean) {named}[?,\n]", said), said


@pytest.mark.parametrize("command, typed", [
    (train, "--num_res_blocks"), (train, "--use_ema"), (train, "--adam_beta1"), (train, "--color_aug"),
    (sample, "--network_dim"), (sample, "--lr"), (train, "--model_type"), (train, "--from_file"),
])  # fmt: skip
def test_no_guess_is_better_than_a_wrong_one(command, typed, capsys):
    with pytest.raises(SystemExit):
        command.parse([typed, "1"])
    said = capsys.readouterr().err
    assert typed in said and "did you mean" not in said and "here it is" not in said
    with pytest.raises(SystemExit):
        sample.parse(["--lr_warmup_steps", "1"])
    assert "train.py" in capsys.readouterr().err


def test_every_name_leads_to_an_option(monkeypatch):
    own = {s for c in (train, sample) for a in parser_of(c, monkeypatch)._actions for s in a.option_strings}  # fmt: skip
    for row in config.OTHER_NAMES.strip().splitlines():
        ours, others = row.split(": ")
        assert set(re.findall(r"--\w+", f"--{ours}")) <= own, row
        assert len(set(others.split())) == len(others.split()), row


@pytest.mark.parametrize("text, named", [
    ("--data toy --epochs inf --preset none", "epochs is inf"),
    ("--epochs nan --preset none", "epochs is nan"),
    ("--batch_size 99999999999999999999", "batch_size must be below"),
    ("--train_steps 1" + "0" * 400, "train_steps must be below"),
    ("--guidance_scale 1e999", "guidance_scale is inf"),
])  # fmt: skip
def test_numbers_without_end(text, named):
    with pytest.raises(UserError, match=named):
        parse(text)


def test_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    for name in config.PATHS:
        made = train.parse([f"--{name}=~/x", "--preset=none", "--mode=latent", "--condition=text",
                            "--fid", *(["--sd_path=y"] if name == "sd_config" else [])])[0]  # fmt: skip
        assert getattr(made, name) == "/home/of/mine/x"
    args = sample.parse(["--load_path=~/x", "--lora=~/x:0.5", "--embedding=~/x", "--prompt=a"])
    assert (args.load_path, args.embedding) == ("/home/of/mine/x", ["/home/of/mine/x"])
    assert args.lora == [("/home/of/mine/x", 0.5)]
    assert visualize.parse(["--data=~/x"]).data == "/home/of/mine/x"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").write_text("a face\n")
    assert sample.parse(["--prompt=@~/x"]).prompt == ["a face"]


def test_files_name_no_place_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Config(data="/data/faces", load_path=str(tmp_path / "a" / "model.pt"), vae="../vae")
    kept = made.shared()
    assert (kept["data"], kept["load_path"], kept["vae"]) == ("faces", "a/model.pt", "../vae")
    assert kept["class_data"] is None and "/data" not in made.to_json()
    assert Config(data="hf:/data/set").shared()["data"] == "hf:set"


# --- what this machine lacks ----------------------------------------------------------------------


def fails_in_one_line(*args, **options) -> str:
    import warm

    done = warm.script(*args, **options)
    assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("ranks", [0, 2])
def test_no_gpu(ranks, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    said = fails_in_one_line("train.py", "--device", "cuda", cwd=tmp_path, ranks=ranks)
    assert "no CUDA GPU" in said and "--device" in said


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_no_compiler(name, tmp_path, model):
    args = ["--load_path", model] if name == "sample.py" else ["--train_steps", 1]
    lacking = {"PATH": "", "CXX": ""}
    said = fails_in_one_line(name, "--compile", *args, "--device", "cpu", cwd=tmp_path, env=lacking)
    assert "--compile" in said and "g++" in said and not list(tmp_path.iterdir())


def test_what_is_compiled_is_kept_where_nobody_else_writes(tmp_path, monkeypatch):
    import torch

    from diffusion.runtime import compiler

    cpu = torch.device("cpu")
    monkeypatch.setenv("CXX", sys.executable)  # any program: nothing is compiled
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/of/mine")
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "diffusion").chmod(0o777)
    compiler.prepare(cpu)
    folder = tmp_path / "diffusion" / "compiled"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "/of/mine"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.parent.stat().st_mode & 0o022 == 0
    # somebody else's
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(UserError, match=f"{tmp_path}.*XDG_CACHE_HOME"):
        compiler.prepare(cpu)


@pytest.mark.slow
def test_compiling_leaves_nothing_in_the_shared_folder(tmp_path):
    code = "import torch; from diffusion.runtime import compiler\n"
    code += "compiler.prepare(torch.device('cpu')); torch.compile(lambda x: x.sin() + 1)(torch.ones(64))"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp"),
           "TORCHINDUCTOR_CACHE_DIR": "", "TRITON_CACHE_DIR": ""}  # fmt: skip
    (tmp_path / "tmp").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
    assert any((tmp_path / "cache" / "diffusion" / "compiled" / "inductor").iterdir())
    assert not list((tmp_path / "tmp").glob("torchinductor*"))


@pytest.mark.parametrize("message, named", [
    ("CUDA out of memory. Tried to allocate 2 GiB", "out of memory"),
    ("CUDA error: device-side assert triggered\nmore", "the GPU failed .*device-side assert"),
    ("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", "out of memory"),
])  # fmt: skip
def test_faults_of_the_machine_are_one_line_and_blamed_on_no_file(message, named):
    import torch

    from diffusion.files.atomic import blame

    kind = torch.OutOfMemoryError if message.startswith("CUDA out") else RuntimeError

    def main():
        raise kind(message)

    with pytest.raises(SystemExit, match=f"^error: {named}") as caught:
        config.run_script(main)
    assert "\n" not in str(caught.value)
    if "CUDA" in message:
        with pytest.raises(kind, match="CUDA"), blame("model.pt"):
            main()
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        config.run_script(lambda: (_ for _ in ()).throw(RuntimeError("a mistake of ours")))


# --- the network ----------------------------------------------------------------------------------

BLOCKED = """
import os, socket
def refuse(*args, **options):
    with open(os.environ["ASKED"], "a") as file:
        print(args, file=file)
    raise OSError("the network was asked")
for name in ("getaddrinfo", "create_connection", "gethostbyname"):
    setattr(socket, name, refuse)
socket.socket.connect = socket.socket.connect_ex = refuse
"""


def offline(tmp_path, *command) -> None:
    """Run a command with every way to the network closed, and see that it tries none."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "ASKED": str(tmp_path / "asked")}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "asked").exists(), (tmp_path / "asked").read_text()


@pytest.mark.slow
def test_nothing_asks_the_network_unless_told_to(tmp_path, model, scratch, faces):
    tiny = (
        "--image_size 16 --unet_dim 8 --dim_mults 1,2 --train_steps 1 --num_samples 1 --device cpu"
    )
    few = "--num_images 1 --steps 2 --device cpu --save_folder out"
    study = "--budget small --steps 2 --num_images 2 --sample_steps 1 "
    study += "--experiments 1 --batch_size 2 --device cpu --save_folder studies"
    offline(tmp_path, ROOT / "train.py", *tiny.split())
    offline(tmp_path, ROOT / "sample.py", "--load_path", model, *few.split())
    offline(tmp_path, ROOT / "visualize.py", "--load_path", model, "--data", faces, *few.split())
    offline(tmp_path, "-m", "diffusion.study", "--load_path", scratch, "--data", faces, *study.split())  # fmt: skip


@pytest.mark.parametrize("given, optimizer, rate", [
    ({}, "muon", 3e-3),
    ({"preset": "flow"}, "muon", 3e-3),
    ({"learning_rate": 0.01}, "muon", 0.01),
    ({"optimizer": "adamw"}, "adamw", 1e-3),
    ({"mode": "vae"}, "adamw", 1e-3),
    ({"mode": "latent", "vae": "results/vae"}, "adamw", 1e-3),
    ({"load_path": "model.pt"}, "adamw", 1e-3),
    ({"load_path": "model.pt", "optimizer": "muon"}, "muon", 1e-3),
    ({"load_path": "model.pt", "adapter": "lora"}, "adamw", 1e-3),
    ({"load_path": "model.pt", "adapter": "lora", "optimizer": "adamw"}, "adamw", 1e-3),
    ({"load_path": "model.pt", "consistency": True}, "adamw", 1e-3),
    ({"load_path": "model.pt", "preset": "toy,fine_tune"}, "adamw", 1e-5),
])  # fmt: skip
def test_a_presets_muon_is_for_pixel_models_from_scratch(given, optimizer, rate):
    """At its learning rate, which is no other optimizer's."""
    found = config_from_args({k: v for k, v in given.items() if k != "preset"}, given.get("preset"))
    assert (found.optimizer, found.learning_rate) == (optimizer, rate)
