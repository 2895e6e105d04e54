"""What torch.compile needs before it compiles."""

import importlib.util
import os
import shutil
import sys

import torch

from .. import UserError
from .user_cache import private_folder

# torch's own place for what it has compiled is /tmp/torchinductor_USER, where another user may have
# laid what would be run
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def prepare(device: torch.device) -> None:
    """Keep what is compiled in the user's cache, unless these variables name another place.

    Raises UserError where there is no compiler.
    """
    variable, usual = "CXX", ("clang++",) if sys.platform == "darwin" else ("g++",)
    if device.type == "cuda":  # Triton's
        variable, usual = "CC", ("gcc", "clang")
        if importlib.util.find_spec("triton") is None:
            raise UserError("--compile needs Triton on a GPU: pip install triton, or leave it out")
    names = (os.environ[variable],) if os.environ.get(variable) else usual
    if not any(map(shutil.which, names)):
        raise UserError(
            f"--compile needs a compiler, and {' or '.join(names)} is not installed: install it "
            f"(such as by apt install {usual[0]}), name another in {variable}, or leave out "
            "--compile"
        )
    for name, folder in CACHES.items():
        if not os.environ.get(name):
            os.environ[name] = str(private_folder("compiled") / folder)
    from torch._inductor.runtime import runtime_utils

    # parts of torch ask for its own place whatever the variables say
    runtime_utils.default_cache_dir = lambda: os.environ["TORCHINDUCTOR_CACHE_DIR"]
