"""Triton kernels compute what the plain layers do (triton_kernels.py, in a process of its own)."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton comes with torch's CUDA build only", allow_module_level=True)


def run(device: str, interpret: str) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_kernels.py")), device],
        env=os.environ | {"TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    importlib.metadata.version("triton") < "3.3", reason="cannot interpret loops with NumPy 2"
)
def test_kernels_in_the_interpreter():
    run("cpu", "1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_the_device():
    run("cuda", "0")
