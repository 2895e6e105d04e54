"""Every command in README.md and docs/ runs as it stands there, only smaller.

A command is a line of a fenced bash block, or inline code that begins with python or torchrun. It is run
in a folder where everything that the pages name exists (FOLDER, STYLES, photo.png, a tiny Stable
Diffusion under its real name), with the options of a RULE added, which make it small: of an option that
is given twice the last one counts. What it needs (results/model.pt) other commands of the pages make.
"""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import warm
from conftest import ROOT
from feature_networks import Pooled
from PIL import Image

from diffusion.data import toy

HISTORY = {"log.md": "what was run at the commits that it names"}
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = [page for page in PAGES if page.name not in HISTORY]

# Commands that no test can run, and why.
NOT_RUN = {
    r"pip install .*": "changes the environment; .ci/run does it in a fresh one",
    r"pytest\b.*": "the tests themselves",
    r"export GLOO_SOCKET_IFNAME=\w+ NCCL_SOCKET_IFNAME=\w+": "names the reader's own network",
    r"#!/bin/bash .*srun .*": "a script for Slurm, which is not there",
}
# Commands that another test runs, or more than one command.
COVERED = {
    r"torchrun --nnodes=8 .*": "test_two_machines_one_cut_off_and_brought_back",
    r"python -m diffusion.reproduce (toy|toy_whole|study)": "test_a_row_comes_back",
    r"python -m diffusion.reproduce cats --data PATH": "test_data_are_those_of_the_row",
    r"python -m diffusion.reproduce --check": "test_the_first_steps_come_back",
    r"python -m diffusion.evaluation REAL results/images --clip .* --lpips": "test_the_command_measures_a_folder",
    r"python sample.py --sd_path hf:.*": "test_stable_diffusion_of_the_hub",
    r"python train.py .* --push_to_hub .*": "test_push_and_load_back",
    r"python benchmarks/ledger.py": "test_tables_are_the_ledgers",
    r"python benchmarks/speedrun.py TRACK .*": "test_every_program_explains_itself",
}


class Rule(NamedTuple):
    """How commands are made small, and what must be there before and after."""

    commands: str  # a regular expression; the first rule that fits counts
    add: str = ""  # options after the command's own
    needs: str = ""  # paths, which rules before this one make
    makes: str = ""  # a path: of the shared ones, or a file that is new
    slow: bool = False


ANY = "--train_steps 2 --save_and_sample_every 2 --batch_size 4 --num_samples 1 --cache_dir cache --device cpu --amp no"
TRAIN = f"{ANY} --sample_steps 2"
SMALL = f"{TRAIN} --image_size 16 --unet_dim 8 --dim_mults 1,2"
VAE = f"{ANY} --image_size 16 --unet_dim 16 --dim_mults 1,2 --latent_channels 3"
LATENT = f"{TRAIN} --image_size 16 --unet_dim 16 --dim_mults 1,2 --text_dim 32 --text_layers 1"
SAMPLE = "--num_images 2 --batch_size 2 --steps 2 --device cpu"
SD15 = f"{TRAIN} --image_size 32"
PROMPTED = "--batch_size 2 --steps 2 --device cpu"
BALD = "--data_class bald"  # a part of the toy
ALONE = f"{SMALL} --save_folder results/new"
STUDY = "--steps 2 --batch_size 4 --num_images 2 --sample_steps 2 --device cpu --amp no"

RULES = [
    # pixels
    Rule(r"python train.py", f"{SMALL} --train_steps 4 {BALD}", makes="results/model.pt"),
    Rule(r"python train.py --preset cifar10 --dry_run", "--cache_dir cache"),
    Rule(r"python (train|sample).py --help"),
    Rule(r"python train.py --preset small .*", SMALL, makes="results/mine/model.pt"),
    Rule(r"python train.py --data FOLDER --image_size 64 .*", SMALL, makes="results/mine64"),
    Rule(r"torchrun .* train.py --data FOLDER --image_size 128 .*", SMALL, makes="results/large", slow=True),
    Rule(r"python train.py --data FOLDER --image_size 96x128 .*", SMALL + " --image_size 16x24", makes="results/wide", slow=True),
    Rule(r"python train.py .*--condition class .*", SMALL, makes="results/classes/model.pt"),
    Rule(r"python train.py --data FOLDER --posthoc_ema .*", SMALL + " --train_steps 16 --save_and_sample_every 1", makes="results/run/model.pt", slow=True),
    Rule(r"python -m diffusion.training.posthoc_ema results/run .*", needs="results/run/model.pt", makes="results/run/*ema_*", slow=True),
    Rule(r"python train.py --preset edm .*", f"{SMALL} {BALD}", makes="results/edm/model.pt"),
    Rule(r"python train.py --preset flow .*", SMALL, makes="results/flow/model.pt"),
    Rule(r"python train.py --path flow .*", ALONE, makes="results/new", slow=True),
    Rule(r"python train.py --consistency .*", f"{TRAIN} {BALD}", "results/model.pt", "results/fast/model.pt"),
    Rule(r"python train.py --data FOLDER --fid .*", ALONE + " --fid_every 2 --fid_num_images 16", makes="results/new", slow=True),
    Rule(r"torchrun .* train.py --data anime_faces --fid .*", ALONE + " --fid_every 2 --fid_num_images 16 --fid_features pooled.pt", makes="results/new", slow=True),
    Rule(r"torchrun .* train.py --mode pixel --data anime_faces", ALONE, makes="results/new"),
    # sampling of pixels
    Rule(r"python sample.py", SAMPLE, "results/model.pt", "results/images"),
    Rule(r"python sample.py --load_path results/model.pt --compile .*", SAMPLE + " --save_folder new", "results/model.pt", "new/images", slow=True),
    Rule(r"python sample.py --load_path results/model.pt --sampler results/table_6.json", "--num_images 2 --device cpu --save_folder new", "results/model.pt results/table_6.json", "new/images"),
    Rule(r"python sample.py --load_path results/model.pt --guide .*", SAMPLE + " --save_folder new", "results/model.pt results/checkpoints/step_00000300.pt", "new/images"),
    Rule(r"python sample.py --load_path results/model.pt --init_image .*", SAMPLE + " --steps 4 --save_folder new", "results/model.pt", "new/images"),
    Rule(r"python sample.py --load_path results/model.pt", "--num_images 4 --steps 2 --device cpu", "results/model.pt", "results/images"),
    Rule(r"python sample.py --load_path results/model.pt .*", SAMPLE + " --save_folder new", "results/model.pt", "new/images"),
    Rule(r"torchrun .* sample.py --load_path results/ema.safetensors .*", SAMPLE + " --save_folder new", "results/model.pt", "new/images"),
    Rule(r"python sample.py --load_path results/classes/model.pt .*", SAMPLE + " --save_folder new", "results/classes/model.pt", "new/images"),
    Rule(r"python sample.py --load_path results/edm/model.pt .*", SAMPLE + " --steps 5 --save_folder new", "results/edm/model.pt", "new/images"),
    Rule(r"python sample.py --load_path results/flow/model.pt .*", SAMPLE + " --save_folder new", "results/flow/model.pt", "new/images"),
    Rule(r"python sample.py --load_path results/fast", "--num_images 2 --device cpu --save_folder new", "results/fast/model.pt", "new/images"),
    Rule(r"python -m diffusion.learn_table .*", "--device cpu", "results/model.pt", "results/table_6.json"),
    # looking and measuring
    Rule(r"python visualize.py", "--steps 2 --device cpu", "results/model.pt", "results/viz*"),
    Rule(r"python visualize.py (.* )?--html", "--steps 2 --device cpu", "results/model.pt", "results/viz*/index.html", slow=True),
    Rule(r"python -m diffusion.(evaluation|study)", "--help"),
    Rule(r"python -m diffusion.evaluation REAL FAKE", "--fid_features pooled.pt", slow=True),
    Rule(r"python -m diffusion.evaluation REAL results/model.pt .*", "--samplers ddim:2,dpmpp_2m:2 --num_images 16 --device cpu --fid_features pooled.pt", "results/model.pt", "results/metrics/quality.json", slow=True),
    Rule(r"python -m diffusion.evaluation REAL results/images --size 64 --copies TRAIN", "--size 16", "results/images", "results/metrics/copies.png"),
    Rule(r"python -m diffusion.reproduce"),
    Rule(r"python benchmarks/solvers.py .*", "--features pooled.pt --images 8 --steps 2 --only ddim:trailing", "results/model.pt", "solvers.json", slow=True),
    # latents from scratch
    Rule(r"python train.py --preset sd_tiny_vae", f"{VAE} {BALD}", makes="results/vae/model.pt"),
    Rule(r"python train.py --preset sd_tiny", f"{LATENT} {BALD}", "results/vae/model.pt", "results/sd_tiny/model.pt"),
    Rule(r"python sample.py --load_path results/sd_tiny/model.pt --lora .*", PROMPTED + " --save_folder new", "results/sd_tiny/model.pt results/lora/adapter.safetensors", "new/images"),
    Rule(r"python sample.py --load_path results/sd_tiny/model.pt .*", PROMPTED + " --save_folder new", "results/sd_tiny/model.pt", "new/images"),
    Rule(r"python train.py --load_path results/model.pt --adapter lora .*", TRAIN + " --save_folder results/pixel_lora", "results/model.pt", "results/pixel_lora/adapter.safetensors"),
    Rule(r"python train.py --load_path results/sd_tiny/model.pt --adapter lora .*", TRAIN, "results/sd_tiny/model.pt", "results/lora/adapter.safetensors"),
    Rule(r"python train.py --preset sd_tiny_vae --data styles2 .*", VAE, makes="vae/model.pt", slow=True),
    Rule(r"python train.py --preset sd_tiny --data styles2 .*", LATENT, "vae/model.pt", "base/ema.safetensors", slow=True),
    Rule(r"python -m diffusion.study --load_path base/.*", STUDY + " --image_size 16 --experiments 1,4 --mix_images 2 --points 2", "base/ema.safetensors", "results/*_styles/report.html", slow=True),
    Rule(r"python -m diffusion.study --load_path results/sd_tiny/.*", STUDY + " --image_size 16 --experiments 3", "results/sd_tiny/model.pt", "results/*_STYLES/report.html", slow=True),
    # Stable Diffusion
    Rule(r"python -m diffusion.study --sd_path .*", STUDY + " --image_size 32 --ranks 1,2,4 --mix_images 2 --points 2 --save_folder new", "stable-diffusion-v1-5", "new/*/report.html", slow=True),
    Rule(r"python sample.py --sd_path model.safetensors .*", PROMPTED + " --save_folder new", "stable-diffusion-v1-5 model.safetensors", "new/images", slow=True),
    Rule(r"python sample.py --sd_path .* --embedding .*", PROMPTED + " --save_folder new", "stable-diffusion-v1-5 my-cat.safetensors", "new/images"),
    Rule(r"python sample.py --sd_path .* --lora_interpolate .*", PROMPTED + " --save_folder new", "stable-diffusion-v1-5 one.safetensors other.safetensors", "new/interpolation.png"),
    Rule(r"python sample.py --sd_path .* --mask .*", PROMPTED + " --steps 4 --save_folder new", "stable-diffusion-v1-5", "new/images"),
    Rule(r"python sample.py --sd_path .* --init_image .*", PROMPTED + " --steps 4 --save_folder new", "stable-diffusion-v1-5", "new/images"),
    Rule(r"python sample.py --sd_path .*", PROMPTED + " --save_folder new", "stable-diffusion-v1-5", "new/images"),
    Rule(r"python train.py --mode latent .* --adapter lora .*", SD15, "stable-diffusion-v1-5", "results/lora_sd/adapter_kohya.safetensors"),
    Rule(r"python train.py --mode latent .* --adapter textual_inversion .*", SD15, "stable-diffusion-v1-5", "results/my-cat/adapter.safetensors"),
    Rule(r"python train.py --mode latent .* --instance_prompt .*", SD15 + " --class_images 2", "stable-diffusion-v1-5", "results/sks/model.pt"),
    Rule(r"python train.py --sd_path .* --path flow .*", SD15 + " --save_folder results/sd_flow", "stable-diffusion-v1-5", "results/sd_flow/model.pt", slow=True),
    Rule(r"python train.py --sd_path .*", SD15, "stable-diffusion-v1-5", "results/tuned/model.pt"),
    Rule(r"torchrun .* train.py --preset anime_sd15 --sd_path (SD15|stable-diffusion-v1-5) --data FOLDER .*", SD15 + " --save_folder results/new", "stable-diffusion-v1-5 SD15", "results/new", slow=True),
    Rule(r"python -m diffusion.export results/tuned/model.pt my-model", "", "results/tuned/model.pt", "my-model/model_index.json", slow=True),
]  # fmt: skip


# --- the pages -----------------------------------------------------------------------------------


def fenced(block: str) -> list[str]:
    """The commands of a bash block, without comments."""
    if block.startswith("#!"):
        return [" ".join(block.split())]
    commands = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            commands.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        commands.append(words)
    return [shlex.join(words).replace("'", '"') for words in commands if words]


def commands_of(page: Path) -> list[str]:
    text = page.read_text()
    found = [c for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S) for c in fenced(block)]  # fmt: skip
    inline = re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))
    return found + [" ".join(c.split()) for c in inline if c.startswith(("python ", "torchrun "))]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))
FOREIGN = {c for c in COMMANDS if any(re.fullmatch(p, c) for p in (*NOT_RUN, *COVERED))}


def rule_of(command: str) -> Rule | None:
    return next((rule for rule in RULES if re.fullmatch(rule.commands, command)), None)


def test_every_command_has_a_rule_and_every_rule_a_command():
    assert len(COMMANDS) > 50
    assert not [c for c in COMMANDS if c not in FOREIGN and rule_of(c) is None]
    assert {rule_of(c) for c in COMMANDS if c not in FOREIGN} == set(RULES)
    for pattern in (*NOT_RUN, *COVERED):
        assert any(re.fullmatch(pattern, c) for c in COMMANDS), pattern


def test_what_others_run_they_run():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in COVERED.values():
        assert f"def {name}(" in tests, name


def test_commands_are_read():
    block = 'a b && c \\\n  --d "e f"   # g\n# h\n\ni "<j>"\n'
    assert fenced(block) == ["a b", 'c --d "e f"', 'i "<j>"']


# --- the folder that they run in -----------------------------------------------------------------


class Workshop:
    """A folder with all that the pages name, and what their commands have made there so far."""

    def __init__(self, root: Path, request):
        self.root, self.request, self.done = root, request, {}
        captions = {
            "FOLDER": ("cat", "dog"),
            "STYLES": ("NEW", "OTHER"),
            "styles2": ("adventurer", "lorelei"),
            "faces_captioned_128": ("big-smile", "lorelei"),
        }
        for name, folders in captions.items():
            self.pictures(name, folders, 120 if name == "FOLDER" else 48, texts=True)
        for name in ("data/anime_faces", "data/cifar10", "TRAIN"):
            self.pictures(name, ("",), 40)
        self.pictures("REAL", ("",), 140, first=500)
        shutil.copytree(root / "REAL", root / "REAL_FOLDER")
        self.pictures("FAKE", ("",), 40, first=900)
        Image.fromarray(toy.draw(7, 48)).save(root / "photo.png")
        Image.new("L", (48, 48), 255).save(root / "mask.png")
        (root / "prompts.txt").write_text("a red fox\na blue fox\n")
        import torch

        torch.jit.script(Pooled()).save(str(root / "pooled.pt"))
        shutil.copy(root / "pooled.pt", root / "RESNET56.pt")

    def pictures(self, name: str, folders: tuple, count: int, first: int = 0, texts: bool = False):
        for i in range(first, first + count):
            file = self.root / name / folders[i % len(folders)] / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(toy.draw(i, 24)).save(file)
            if texts:
                file.with_suffix(".txt").write_text(toy.caption(i))

    def need(self, path: str) -> None:
        """Make what a command needs, by the command of the pages that makes it, or by hand."""
        if (self.root / path).exists():
            return
        if path in ("stable-diffusion-v1-5", "SD15"):
            (self.root / path).symlink_to(self.request.getfixturevalue("sd_folder"))
        elif path == "model.safetensors":
            self.run("python -m diffusion.export results/tuned/model.pt my-model")
            self.script("-m diffusion.export results/tuned/model.pt model.safetensors")
        elif path == "results/checkpoints/step_00000300.pt":
            self.need("results/model.pt")
            shutil.copy(self.root / "results/checkpoints/step_00000002.pt", self.root / path)
        elif path == "results/images":
            self.run("python sample.py --load_path results/model.pt")
        elif path in ("one.safetensors", "other.safetensors"):
            self.need("results/lora_sd/adapter_kohya.safetensors")
            shutil.copy(self.root / "results/lora_sd/adapter_kohya.safetensors", self.root / path)
        elif path == "my-cat.safetensors":
            self.need("results/my-cat/adapter.safetensors")
            shutil.copy(self.root / "results/my-cat/adapter.safetensors", self.root / path)
        else:
            (rule,) = [rule for rule in RULES if rule.makes == path]
            self.run(next(c for c in COMMANDS if rule_of(c) is rule))
        assert (self.root / path).exists(), path

    def script(self, command: str, ranks: int = 0) -> str:
        """Run `train.py ...` or `-m module ...` here; what it printed."""
        name, *args = shlex.split(command)
        if name == "-m":
            name, *args = args
        if name == "diffusion.learn_table":
            return self.learn_table(args)
        done = warm.script(name, *args, cwd=self.root, ranks=ranks)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    def learn_table(self, args: list[str]) -> str:
        """In this process: no option makes it small."""
        from diffusion import learn_table

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learn_table, "TEACHER", ("unipc2", 8))
            for name, value in dict(TAUGHT=16, JUDGED=8, EPOCHS=1).items():
                patch.setattr(learn_table, name, value)
            patch.setattr(sys, "argv", ["learn_table", *args])
            patch.chdir(self.root)
            learn_table.main()
        return "learned"

    def run(self, command: str) -> None:
        """Run a command of the pages, unless it has been run; look whether it made what it says."""
        if command in self.done:
            assert self.done[command], "failed before"
            return
        self.done[command] = False
        rule = rule_of(command)
        for path in rule.needs.split():
            self.need(path)
        for scratch in ("new", "results/new"):
            shutil.rmtree(self.root / scratch, ignore_errors=True)
        ranks = 2 if command.startswith("torchrun ") else 0
        short = re.sub(r"^(python|torchrun --nproc_per_node=\d) ", "", command)
        said = self.script(f"{short} {rule.add}", ranks)
        found = sorted(self.root.glob(rule.makes)) if rule.makes else [said]
        assert found and all(found), f"{command}: no {rule.makes}\n{said}"
        if rule.makes.endswith("images"):
            files = list((self.root / rule.makes).glob("*.png"))
            assert files and all(Image.open(file).size[0] >= 16 for file in files)
        if rule.makes.endswith(".json"):
            assert json.loads(found[0].read_text())
        self.done[command] = True


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, request) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"), request)


def marked(command: str):
    marks = [pytest.mark.slow] if rule_of(command).slow else []
    return pytest.param(command, marks=marks, id=command[:90])


RUN = [marked(c) for c in COMMANDS if c not in FOREIGN and rule_of(c)]


@pytest.mark.parametrize("command", RUN)
def test_a_command_of_the_pages(command, workshop):
    workshop.run(command)


# --- Python --------------------------------------------------------------------------------------

BLOCKS = {
    f"{page.name} {i}": block
    for page in PAGES
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
}
# what makes them small: texts, and what stands for them
SHORT = {
    "image_size=64, train_steps=5000": "image_size=16, unet_dim=8, batch_size=4, train_steps=2, num_samples=1",
    "strength=0.4, steps=20": "strength=0.5, steps=2",
    "steps=20": "steps=2",
    "steps=25": "steps=2",
}


def test_each_python_of_the_pages_is_found():
    assert {name.split()[0] for name in BLOCKS} >= {"README.md", "sample.md", "train.md"}
    text = "".join(BLOCKS.values())
    assert all(long in text for long in SHORT)


@pytest.mark.parametrize("name", BLOCKS)
def test_python_of_the_pages(name, workshop, monkeypatch):
    """Each runs by itself, beside the files that it names."""
    block = BLOCKS[name]
    for path in ("results/model.pt", "stable-diffusion-v1-5", "one.safetensors"):
        if path in block:
            workshop.need(path)
    for long, short in SHORT.items():
        block = block.replace(long, short)
    monkeypatch.chdir(workshop.root)
    before = set(workshop.root.rglob("*"))
    exec(compile(block, name, "exec"), {})
    assert set(workshop.root.rglob("*")) - before  # each leaves something
