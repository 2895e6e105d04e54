"""What the benchmarks share: turns, clocks, the machine's peak, the last line."""

import bisect
import contextlib
import json
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # all sides', however busy


def timed(call, device) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def serve(pipe, device, build) -> None:
    """In a process of its own, as a user would run it: time a call whenever told to."""
    call = build()
    pipe.send(None)
    with contextlib.suppress(EOFError):  # the end of whoever asks
        while pipe.recv():
            pipe.send((timed(call, device), peak_memory(device)))


def peak_memory(device) -> int:
    """Bytes: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_turn(
    sides: dict, device, repeats: int, warm_up: int = 2, median: bool = True
) -> tuple[dict, dict]:
    """Median seconds (or all) and peak bytes of each side; they take turns, so that what slows one down
    slows them all. sides: {name: a picklable function that returns what is to be called}."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, times, memory = {}, [], {name: [] for name in sides}, {}
    for name, build in sides.items():
        mine, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, device, build)))
        processes[-1].start()
        theirs.close()
        try:
            mine.recv()
            pipes[name] = mine
        except EOFError:  # its error has been printed
            print(f"{name} cannot run here", flush=True)
            processes[-1].join()
    for i in range(repeats + warm_up):
        for name, pipe in list(pipes.items()):
            try:
                pipe.send(True)
                seconds, memory[name] = pipe.recv()
            except (EOFError, OSError):  # its error has been printed; the others go on
                print(f"{name} has ended", flush=True)
                del pipes[name]
                continue
            times[name] += [seconds] if i >= warm_up else []
            if i == warm_up:  # something to see before the end
                print(
                    f"{name}: {seconds:.3g} s at its first measured turn of {repeats}", flush=True
                )
            if device.type == "cpu":
                time.sleep(0.3)  # until its threads no longer spin
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    return {k: statistics.median(times[k]) if median else times[k] for k in pipes}, memory


def flops_of(call) -> int:
    """Count the forward FLOPs of a call: the same number on every machine."""
    from diffusion.training.dry_run import count_flops  # who imports this has set the path

    with count_flops() as counter, torch.no_grad():
        call()
    return counter.flops


def peak_flops(device, dtype=torch.bfloat16) -> float:
    """FLOP/s of the faster of a 4096 matrix product and a wide 3x3 convolution."""
    a = torch.randn(4096, 4096, device=device, dtype=dtype)
    x = torch.randn(32, 128, 64, 64, device=device, dtype=dtype)
    w = torch.randn(128, 128, 3, 3, device=device, dtype=dtype)
    x, w = (v.contiguous(memory_format=torch.channels_last) for v in (x, w))
    work = {2 * 4096**3: lambda: a @ a,
            2 * 32 * 64 * 64 * 128 * 128 * 9: lambda: torch.nn.functional.conv2d(x, w, padding=1)}  # fmt: skip
    with torch.no_grad():
        return max(f / min(timed(call, device) for _ in range(4)) for f, call in work.items())


def bandwidth(device) -> float:
    """Bytes/s of a large copy, read and written."""
    a, b = (torch.ones(2**26, device=device) for _ in range(2))
    return 2 * a.nbytes / min(timed(lambda: b.copy_(a), device) for _ in range(8))


def lucidrains_flops(dim: int, mults, size: int) -> int:
    """Of a forward pass of denoising-diffusion-pytorch's Unet."""
    from denoising_diffusion_pytorch import Unet

    unet, x, t = Unet(dim, dim_mults=mults), torch.zeros(1, 3, size, size), torch.zeros(1)
    return flops_of(lambda: unet(x, t))


def nearest_width(target: int, flops_at) -> tuple[int, int]:
    """Find the multiple of 8 whose network costs nearest to `target`; and its FLOPs.

    flops_at(width): those of a forward pass, which grow with the width.
    """
    flops_at = cache(flops_at)
    widths = range(8, 257, 8)
    i = bisect.bisect_left(widths, target, key=flops_at)  # builds six networks of the 32 at most
    near = widths[max(0, i - 1) : i + 1]
    best = min(near, key=lambda width: abs(flops_at(width) - target))
    return best, flops_at(best)


def our_flops(dim: int, mults, size: int) -> int:
    """Count those of a forward pass of our pixel U-Net."""
    from diffusion.models.build import build_pixel_unet

    unet, x, t = build_pixel_unet(dim, mults), torch.zeros(1, 3, size, size), torch.zeros(1)
    return flops_of(lambda: unet(x, t))


def diffusers_model(width: int, size: int):
    """As examples/unconditional_image_generation sets it up, but for the width (there 128)."""
    from diffusers import UNet2DModel

    down = ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"]
    up = ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4
    return UNet2DModel(
        sample_size=size, in_channels=3, out_channels=3, layers_per_block=2,
        block_out_channels=[width * m for m in (1, 1, 2, 2, 4, 4)], down_block_types=down,
        up_block_types=up, norm_num_groups=math.gcd(width, 32),
    )  # fmt: skip


def diffusers_flops(width: int, size: int) -> int:
    """Count those of a forward pass of `diffusers_model`."""
    model, x = diffusers_model(width, size), torch.zeros(1, 3, size, size)
    return flops_of(lambda: model(x, 1))


def equal_costs(dim: int, mults, size: int) -> tuple[int, int, dict[str, int]]:
    """Call `count_costs` in a process of its own, whose memory is no side's: peaks are inherited."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(count_costs, dim, mults, size).result()


def count_costs(dim: int, mults, size: int) -> tuple[int, int, dict[str, int]]:
    """Our width and diffusers' whose forward passes cost nearest to lucidrains' of width dim, and the
    FLOPs of each side. A peer that is not installed has none; without lucidrains' dim is our width."""
    flops, ours, theirs = {}, dim, 0
    try:
        target = flops["lucidrains"] = lucidrains_flops(dim, mults, size)
        ours, flops["ours"] = nearest_width(target, lambda width: our_flops(width, mults, size))
    except ImportError:
        target = flops["ours"] = our_flops(dim, mults, size)
    with contextlib.suppress(ImportError):
        theirs, flops["diffusers"] = nearest_width(
            target, lambda width: diffusers_flops(width, size)
        )
    return ours, theirs, flops


def add_device(parser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)


def run_script(name: str, options: list[str], log: Path, threads: int | None = None) -> float:
    """Seconds of train.py or sample.py, whose output goes into a file. Raises RuntimeError with its
    last line. threads: to compute on (default: the program's own choice)."""
    env = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with log.open("w") as out:
        command = [sys.executable, ROOT / name, *options]
        status = subprocess.run(command, env=env, stdout=out, stderr=out).returncode
    if status:
        raise RuntimeError((log.read_text().strip().splitlines() or ["(nothing)"])[-1])
    return time.perf_counter() - began


def moments_of(folder: Path, features, side: int) -> tuple:
    """Mean and covariance of the features of a folder's images, the central square of each."""
    from diffusion.data.images import read_image
    from diffusion.evaluation.distances import moments

    files = sorted(file for file in folder.iterdir() if file.is_file())
    parts = [files[low : low + 100] for low in range(0, len(files), 100)]
    read = (np.stack([read_image(file, side) for file in part]) for part in parts)
    return moments(torch.cat([features(images) for images in read]))


def commit() -> str:
    """The commit that runs; empty where git or its folder is missing."""
    command = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return ""


def report(bench: str, device, results: dict) -> None:
    """The last line: JSON, with the machine and the commit."""
    cpu = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    machine = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    print(json.dumps({"bench": bench, "device": device.type, "machine": machine,
                      "torch": torch.__version__, "commit": commit(), **results}))  # fmt: skip
