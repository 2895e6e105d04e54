"""Stable Diffusion 1.5 at full size, with random weights: files, memory, one guidance step.

Four gigabytes on disk and some minutes: marked slow.
"""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from diffusion.files import sd_files as loader
from diffusion.models.clip import CLIPTextModel
from diffusion.models.configs import CLIPTextConfig, UNetConfig, VAEConfig
from diffusion.models.sd_unet import SDUNet
from diffusion.models.tokenizer import byte_level
from diffusion.models.vae import AutoencoderKL

pytestmark = pytest.mark.slow

LOAD = """
import json, sys, time
import torch
sys.path.insert(0, sys.argv[1])
from diffusion.files import sd_files as loader
def rss():  # the most so far; getrusage would count the parent's
    line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
before, began = rss(), time.perf_counter()
sd = loader.load_sd(sys.argv[2], config=sys.argv[3])
seconds = time.perf_counter() - began
total = sum(float(p.sum()) for m in (sd.unet, sd.vae, sd.text_encoder) for p in m.parameters())
print(json.dumps({"seconds": seconds, "peak": rss() - before, "total": total}))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder, single file), both in float16: 2.1 GB each."""
    root = tmp_path_factory.mktemp("full")
    torch.manual_seed(0)
    parts = {}
    for name, make in (
        ("unet", lambda: SDUNet(UNetConfig())),
        ("vae", lambda: AutoencoderKL(VAEConfig())),
        ("text_encoder", lambda: CLIPTextModel(CLIPTextConfig())),
    ):
        with torch.device("meta"):
            model = make()
        model = model.half().to_empty(device="cpu")
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02)
        parts[name] = model
    # a vocabulary of CLIP's size is not needed to measure loading
    sd = loader.StableDiffusion(**parts, tokenizer=byte_level(77), scheduler=loader.SCHEDULER, report=[])  # fmt: skip
    loader.save_sd_folder(sd, root / "folder")
    loader.save_sd_file(sd, root / "model.safetensors")
    return root / "folder", root / "model.safetensors"


@pytest.mark.parametrize("kind", [0, 1], ids=["folder", "file"])
def test_loading_is_lean(files, kind):
    """Peak memory, all weights read once: at most 1.2 times the file."""
    folder, file = files
    done = subprocess.run([sys.executable, "-c", LOAD, str(ROOT), str(files[kind]), str(folder)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    size = file.stat().st_size
    print(
        f"{files[kind].name}: {found['seconds']:.1f} s, peak {found['peak'] / size:.2f} of the file"
    )
    assert 0.9 * size <= found["peak"] <= 1.2 * size


def test_a_guidance_step_is_not_slower_than_diffusers():
    pytest.importorskip("diffusers", reason="needs diffusers (tests/requirements.txt)")
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "sd_step.py", "--parts", "unet",
                           "--repeats", "3"], capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["relative_difference"]["unet"] < 0.05  # bfloat16
    assert found["ratio"]["unet"] > 0.9  # faster on a quiet machine; this one may not be
