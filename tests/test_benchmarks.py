"""The benchmarks run: every side that is installed has its number, at a size of seconds."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT, environment

PEERS = {"lucidrains": "denoising_diffusion_pytorch", "diffusers": "diffusers"}
SIDES = {
    "train_step.py": ({"ours"}, ("shipped", "tuned")),
    "sample.py": ({"ours", "ours_float32", "ours_dpmpp_2m"}, ("shipped", "bf16")),
}
TINY = ["--dim", 8, "--size", 32, "--mults", "1,2", "--repeats", 1, "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("name, options", [
    ("train_step.py", ["--batch_size", 2]),
    ("sample.py", ["--steps", 2, "--counts", "2"]),
])  # fmt: skip
def test_a_benchmark_has_all_its_sides(name, options, tmp_path):
    own, ways = SIDES[name]
    peers = [peer for peer, module in PEERS.items() if importlib.util.find_spec(module)]
    command = [sys.executable, ROOT / "benchmarks" / name, *TINY, *options]
    done = subprocess.run(
        [*map(str, command)], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    found = last["seconds"] if name == "train_step.py" else last["images_per_second"]["2"]
    assert found.keys() == own | {f"{peer}_{way}" for peer in peers for way in ways}, done.stderr
    assert all(value > 0 for value in found.values())
    if name == "train_step.py":
        assert last["update_seconds"] > 0
