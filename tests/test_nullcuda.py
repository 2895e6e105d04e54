"""CUDA's paths without a GPU: what training and sampling launch, wait for, allocate and capture.

tests/nullcuda is a CUDA device that computes nothing. What torch does on the host is real there:
its dispatch, autograd, allocator, capture of graphs, and Triton's compilation to machine code.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent / "nullcuda"

# what was measured: launches of a step, kernels in its graph (0: it has none). A step may have a few
# more; where it has far fewer, write the new numbers here.
STEPS = {
    "pixel": (13, 975),
    "eager": (984, 0),
    "dropout": (15, 1013),
    "muon": (13, 2062),
    "class": (15, 1018),
    "fp16": (995, 0),
    "accumulated": (20, 2145),
    "vae": (10, 521),
    "latent": (17, 553),
    "latent class": (19, 572),
    "latent text": (19, 1096),
    "lora": (13, 1493),
    "text lora": (19, 1968),
    "inversion": (19, 707),
}
SAMPLES = {
    ("pixel", "ddim eager"): (182, 0),
    ("pixel", "ddim graph"): (5, 182),
    ("pixel", "dpmpp_2m_sde eager"): (189, 0),
    ("pixel", "dpmpp_2m_sde graph"): (10, 187),
    ("class", "ddim eager"): (191, 0),
    ("class", "ddim graph"): (7, 191),
    ("class", "dpmpp_2m_sde eager"): (198, 0),
    ("class", "dpmpp_2m_sde graph"): (12, 196),
    ("latent text", "ddim eager"): (256, 0),
    ("latent text", "ddim graph"): (7, 256),
    ("latent text", "dpmpp_2m_sde eager"): (263, 0),
    ("latent text", "dpmpp_2m_sde graph"): (12, 261),
}
KNOWN = torch.__version__.startswith(("2.11.", "2.14."))  # versions that it was tried with
SLACK = 1.03 if KNOWN else 1.2  # others may launch a few kernels more
PLAIN = {"pixel": (13, 2266), "ddim graph": (5, 671)}  # without Triton


def why_not() -> str | None:
    """Say what is missing to build the device."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        return "needs Linux and g++ (apt install g++)"
    if not (torch.version.cuda or "").startswith("13."):
        return f"needs torch for CUDA 13; this is {torch.__version__}"
    site = Path(torch.__file__).parents[1]
    headers = (
        site / "nvidia/cu13/include/cuda_runtime_api.h",
        site / "triton/backends/nvidia/include/cuda_runtime_api.h",
    )
    if importlib.util.find_spec("triton") is None or not any(map(Path.exists, headers)):
        return "needs triton, with CUDA's headers, as torch for CUDA brings it"
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A function that runs watch.py with these arguments, and gives what it found."""
    build = tmp_path_factory.mktemp("nullcuda")
    known = (
        "PATH",
        "HOME",
        "LANG",
        "XDG_CACHE_HOME",
        "TRITON_CACHE_DIR",
        "LD_LIBRARY_PATH",
        "TMPDIR",
    )
    env = {k: v for k, v in os.environ.items() if k in known}
    env |= {"PYTHON": sys.executable, "NULLCUDA_BUILD": str(build), "OMP_NUM_THREADS": "1"}

    def run(*names: str) -> dict:
        command = [FOLDER / "run", sys.executable, FOLDER / "watch.py", *names]
        done = subprocess.run(
            command, cwd=build, env=env, capture_output=True, text=True, timeout=600
        )
        if done.returncode and not KNOWN:
            pytest.skip(f"the device does not know what torch {torch.__version__} calls")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def everything(watched) -> dict:
    return watched(*STEPS, *{f"sample:{name}" for name, _ in SAMPLES})


def near(count: int, measured: int) -> bool:
    return 0.5 * measured < count <= SLACK * measured + 2


def check_step(found: dict, launches: int, captured: int) -> None:
    """Compare what was found of a step with what it may do."""
    assert "error" not in found, found["error"]
    assert found["waits"] == found["waiting_copies"] == 0, found
    assert not found.get("where"), found
    assert found["mallocs"] == found["host_mallocs"] == found["violations"] == 0, found
    assert near(found["launches"], launches), found
    assert found["replays"] == (1 if captured else 0)
    if captured:
        assert near(found["captured"], captured), found


def test_a_step_without_triton_is_one_launch_that_waits_for_nothing(watched):
    found = watched("--plain", "pixel", "sample:pixel")
    assert found["pixel"]["steps"] >= 5
    check_step(found["pixel"], *PLAIN["pixel"])
    check_step(found["sample:pixel"]["ddim graph"], *PLAIN["ddim graph"])


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_training_step(everything, name):
    check_step(everything[name], *STEPS[name])
    assert everything[name]["steps"] >= 5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), SAMPLES)
def test_a_step_of_sampling(everything, name, how):
    found = everything[f"sample:{name}"]
    check_step(found if "error" in found else found[how], *SAMPLES[name, how])
