"""What processes do that are forked from a server that has imported everything (warm.py).

Scripts, or a training that dies at a chosen point (test_faults.py): real signals. Dying at a point
(half a checkpoint on the disk, the hundredth image of a cache, the third step of a sampler) is done
from within: from outside one would hit it by luck.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import fault_plan
import torch
import torch._dynamo  # noqa: F401 - what takes seconds is imported before the fork
import torch.utils.tensorboard  # noqa: F401

from diffusion.config import Config, run_script
from diffusion.data import latents as encoded
from diffusion.data import pixels
from diffusion.evaluation import __main__ as metrics  # noqa: F401
from diffusion.runtime import distributed  # noqa: F401
from diffusion.training import recipe, trainer


def settle(output: str, errors: str) -> None:
    """What a started process would have, and a forked one has not."""
    torch.set_num_threads(1)  # the same in each: sums in another order are other bits
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)


def script(name: str, args: list[str], cwd: str, env: dict, output: str, errors: str) -> None:
    """As `python NAME ARGS`, or `python -m NAME ARGS` where NAME is no file."""
    settle(output, errors)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "FAULT_PLAN" in env:
        fault_plan.install()
    sys.argv = [name, *args]
    if name.endswith(".py"):
        sys.path.insert(0, str(Path(name).parent))
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def countdown(n: int):
    """A function that kills this process at its n-th call."""
    left = [n]

    def tick():
        left[0] -= 1
        if left[0] <= 0:
            die()

    return tick


def at_checkpoint(n: int) -> None:
    """Before one of the writes, renames and links of which saving consists; when n is a multiple
    of 3, with half of the file on the disk."""
    tick = countdown(n)
    real = {name: getattr(os, name) for name in ("replace", "fsync", "link")}

    def before(name):
        def call(*args, **options):
            if name == "fsync" and n % 3 == 0 and os.fstat(args[0]).st_size > n << 10:
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                die()
            tick()
            return real[name](*args, **options)

        return call

    for name in real:
        setattr(os, name, before(name))


def at_image(n: int) -> None:
    tick, real = countdown(n), pixels.read_noting

    def read_noting(*args):
        tick()
        return real(*args)

    pixels.read_noting = read_noting


def at_latents(n: int) -> None:
    tick, real = countdown(n), encoded.to_unit

    def to_unit(*args):
        tick()
        return real(*args)

    encoded.to_unit = to_unit


def at_sampling(n: int) -> None:
    tick, real = countdown(n), recipe.Recipe.frames

    def frames(self, *args):
        for frame in real(self, *args):
            tick()
            yield frame

    recipe.Recipe.frames = frames


PLACES = {"checkpoint": at_checkpoint, "cache": at_image, "latents": at_latents,
          "sampling": at_sampling}  # fmt: skip


def run(options: dict, output: str, place: str | None, n: int) -> None:
    """What train.py does. place, n: die there, at the n-th time."""
    settle(output, output)
    if place is not None:
        PLACES[place](n)

    def main() -> None:
        trainer.train(Config(**options))
        distributed.cleanup()

    run_script(main)
