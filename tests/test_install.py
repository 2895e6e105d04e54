"""The package as it is installed: elsewhere, without the clone, and where there is no Linux."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 reads no TOML by itself")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROGRAMS = {"diffusion-train", "diffusion-sample", "diffusion-visualize"}


def run(*command, cwd: Path, **env) -> subprocess.CompletedProcess:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=500
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_project_says_what_it_needs_once():
    assert set(PROJECT["dynamic"]) == {"version", "dependencies"}
    assert PROJECT["requires-python"] == ">=3.10"
    assert {"hub", "lpips", "wandb", "notebook"} <= PROJECT["optional-dependencies"].keys()
    assert PROGRAMS == PROJECT["scripts"].keys()
    for name, target in PROJECT["scripts"].items():
        module, function = target.split(":")
        script = (ROOT / f"{name.removeprefix('diffusion-')}.py").read_text()
        assert f"from {module} import {function}" in script


def test_every_file_that_the_code_reads_is_in_the_package():
    """Files beside the code, by their suffixes: what pyproject.toml names, and nothing else."""
    found = {p.suffix for p in (ROOT / "diffusion").rglob("*") if p.is_file()} - {".py", ".pyc"}
    text = (ROOT / "pyproject.toml").read_text()
    named = re.search(r"package-data\]\n\"\*\" = \[(.+?)\]", text)[1]
    assert found == set(re.findall(r"\*(\.\w+)", named))


@pytest.mark.slow
def test_a_wheel_works_elsewhere(tmp_path):
    """Built from what git has, unpacked alone: train, sample, look, from a folder that is not the clone."""
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    run("git", "clone", "-q", ROOT, tmp_path / "clone", cwd=tmp_path)
    wheel = subprocess.run(
        [*pip, "wheel", "--no-deps", "-w", tmp_path, tmp_path / "clone"], capture_output=True, text=True
    )  # fmt: skip
    if wheel.returncode and "setuptools" in wheel.stderr and "No matching" in wheel.stderr:
        pytest.skip("pip finds no setuptools to build with")
    assert wheel.returncode == 0, wheel.stderr
    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", site, *tmp_path.glob("*.whl"), cwd=tmp_path)
    assert PROGRAMS <= {p.name for p in (site / "bin").iterdir()}
    here = tmp_path / "here"
    here.mkdir()
    env = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    start = lambda name, *args: run(sys.executable, site / "bin" / name, *args, cwd=here, **env)
    said = start("diffusion-sample", "--num_images", 2, "--steps", 3).stdout
    assert said.splitlines()[-1] == "next: diffusion-visualize --html"
    start("diffusion-visualize", "--html", "--num_images", 1, "--steps", 3)
    page = (here / "results" / "viz" / "index.html").read_text()
    assert "laboratory" in page and len(page) > 100_000
    small = ("--train_steps", 4, "--save_and_sample_every", 4, "--num_samples", 1, "--unet_dim", 8)
    said = start("diffusion-train", *small, "--save_folder", "results/mine").stdout
    last = "next: diffusion-sample --load_path results/mine/model.pt --save_folder results/mine"
    assert said.splitlines()[-1].endswith(last)
    start("diffusion-sample", "--load_path", "results/mine/model.pt", "--num_images", 1)
    code = "import diffusion; print(diffusion.__file__, len(diffusion.load().sample(2, steps=2).pil()))"
    said = run(sys.executable, "-c", code, cwd=here, **env).stdout.split()
    assert Path(said[-2]).is_relative_to(site) and said[-1] == "2"
    # what needs the clone says so
    done = subprocess.run([sys.executable, "-m", "diffusion.reproduce"], cwd=here, env={**os.environ, **env}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and "clone" in done.stderr and "Traceback" not in done.stderr


# what Windows or macOS lack
ELSEWHERE = """
import os, signal, sys, pathlib
import torch
sys.argv = ["train.py", "--train_steps", "4", "--save_and_sample_every", "2", "--num_samples", "1",
            "--unet_dim", "8", "--device", "cpu", "--data_class", "bald"]
for name in ("fcntl", "resource", "pwd", "grp", "triton"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "getuid", "geteuid", "O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK",
             "posix_fadvise", "posix_fallocate", "getloadavg", "mkfifo", "fchmod", "fchown"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGUSR1", "SIGALRM", "SIGHUP", "SIGKILL"):
    delattr(signal, name)
real = pathlib.Path.exists
proc = lambda path: str(path).startswith(("/proc", "/sys"))
pathlib.Path.exists = lambda self, **o: not proc(self) and real(self, **o)
text, opened = pathlib.Path.read_text, open
def read_text(self, *args, **options):
    if proc(self):
        raise FileNotFoundError(self)
    return text(self, *args, **options)
pathlib.Path.read_text = read_text
from diffusion.commands import sample, train
train.command()
sys.argv = ["sample.py", "--load_path", "results/model.pt", "--num_images", "1", "--device", "cpu"]
sample.command()
"""


def test_the_toy_needs_nothing_that_only_linux_has(tmp_path):
    """Known of Windows and macOS without one: no fcntl, no /proc, fewer signals and calls."""
    env = {"PYTHONPATH": str(ROOT)}
    done = run(sys.executable, "-c", ELSEWHERE, cwd=tmp_path, **env)
    assert (tmp_path / "results" / "model.pt").is_file() and "done" in done.stdout
    assert (tmp_path / "results" / "images" / "000000.png").is_file()
