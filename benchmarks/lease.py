#!/usr/bin/env python3
"""One lease of one GPU: what each fast path brings, measured beside the plain one in one run.

python benchmarks/lease.py [--seconds 480] [--only train,profile] [--tiny]

Sections run in one process, in the order of their worth; each may fail without the others, and none
begins that would not end within --seconds; what hangs is killed 20 seconds later. After each, all
results so far are in $OUT/lease.json (default /tmp/lease). --tiny tries the program out, also on a
device that computes nothing (tests/nullcuda). `plain` is the network of models/ without what
models/cuda.py puts in it; `graph` is a whole step as one CUDA graph. Peers need
pip install denoising-diffusion-pytorch diffusers.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType

import common
import torch
from sd_step import fill
from step import Step
from torch.profiler import ProfilerActivity

sys.path.insert(0, str(common.ROOT))

from diffusion.config import Config  # noqa: E402
from diffusion.models import cuda  # noqa: E402
from diffusion.models.build import NETWORKS, build_pixel_unet  # noqa: E402
from diffusion.models.cond import NOTHING, Cond  # noqa: E402
from diffusion.models.configs import CLIPTextConfig, UNetConfig, VAEConfig  # noqa: E402
from diffusion.models.tokenizer import byte_level  # noqa: E402
from diffusion.models.unet import UNet  # noqa: E402
from diffusion.process.names import DEFAULT_SAMPLER, DEFAULT_STEPS  # noqa: E402
from diffusion.process.objective import training_loss  # noqa: E402
from diffusion.process.schedule import make_schedule  # noqa: E402
from diffusion.runtime.cuda_graph import Graph  # noqa: E402
from diffusion.runtime.distributed import setup  # noqa: E402
from diffusion.sampling.codec import LatentCodec, PixelCodec  # noqa: E402
from diffusion.sampling.conditioning import Prompts, Unconditional  # noqa: E402
from diffusion.sampling.pipeline import Pipeline  # noqa: E402

BEGAN = float(os.environ.setdefault("LEASE_BEGAN", str(time.time())))
CUDA = torch.device("cuda")
CHANNELS_LAST = torch.channels_last
BF16 = torch.bfloat16
OUT = Path(os.environ.get("OUT", "/tmp/lease"))
SHAPES = {  # what is trained: width, multiples, pixels a side, batch
    "64px_dim128_B64": (128, (1, 2, 4, 8), 64, 64),
    "32px_dim64_B512": (64, (1, 2, 4, 8), 32, 512),
    "32px_dim64_B128": (64, (1, 2, 4, 8), 32, 128),
}
ONE_PASS = "one_pass"  # training/train_step.py's update of weights, moments and averages
FAMILIES = {  # of models/cuda.py's functions; one that is named nowhere is a family of its own
    "norms": {"group_norm", "block", "res_block", "resnet_block"},
    "upsampling": {"upsample", "upsample_2d"},
    "update": {ONE_PASS},
    "biases": {"convolve"},
}
SMALL = (16, (1, 2), 16, 2)
LARGEST = "64px_dim128_B64"
FLOPS = {(128, 64): 73.59e9, (64, 32): 4.60e9}  # forward, an image of a width and a side: --dry_run
SD_FLOPS = 0.803e12  # forward, a latent of 64x64; docs/scale.md
args = argparse.Namespace(seconds=480.0, tiny=False, prewarm=None)
results: dict = {}


def say(text: str) -> None:
    print(f"[{time.time() - BEGAN:4.0f}] {text}", flush=True)


def left() -> float:
    """Give the seconds that are left."""
    return args.seconds - (time.time() - BEGAN)


def shape_of(name: str) -> tuple:
    return SMALL if args.tiny else SHAPES[name]


def flops_of(name: str) -> float:
    dim, _, size, _ = SHAPES[name]
    return FLOPS[dim, size]


# --- clocks --------------------------------------------------------------------------------------


def clock(call: Callable, calls: int = 12, warm_up: int = 5) -> dict[str, float]:
    """Give milliseconds of a call, where the host runs ahead of the device.

    ms: of each of many calls. device_ms: between events around one, the median; what the host holds
    up counts. host_ms: until one call returns to an idle device; the driver holds it up once about
    a thousand kernels are waiting, so that large batches make it look longer than it is.
    """
    if args.prewarm:
        call()
        return dict.fromkeys(("ms", "device_ms", "host_ms"), math.nan)
    for _ in range(warm_up):
        call()
    alone = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        alone.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    began = time.perf_counter()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    device = [a.elapsed_time(b) for a, b in zip(events, events[1:])]
    return {
        "ms": 1e3 * seconds / calls,
        "device_ms": statistics.median(device),
        "host_ms": 1e3 * min(alone),
    }


def seconds_of(call: Callable, calls: int = 3) -> float:
    """Give the median seconds of a call that is waited for, after a first one."""
    call()
    if args.prewarm:
        return math.nan
    return statistics.median(common.timed(call, CUDA) for _ in range(calls))


def fresh() -> None:
    """Give back the memory of what went before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**30


@contextlib.contextmanager
def failing_alone(name: str, found: dict):
    """Keep an error of one side from ending the others: it is said, and is its result."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        found[name] = {"error": repr(error)[:400]}
        say(f"{name} FAILED: {error!r:.300}")


# --- what is measured ----------------------------------------------------------------------------


def families() -> dict[str, set[str]]:
    """Name the families of kernels, and the functions that bring them."""
    functions = {ONE_PASS} | {fast.__name__ for _, _, fast in cuda.FAST}
    known = {name: members & functions for name, members in FAMILIES.items()}
    others = functions - set().union(*known.values())
    return {name: m for name, m in known.items() if m} | {name: {name} for name in sorted(others)}


def all_kernels() -> set[str]:
    return set().union(*families().values())


def install(network: torch.nn.Module, chosen: set[str]) -> torch.nn.Module:
    """Replace some forwards only: by these functions of models/cuda.py; returns the network."""
    for module in network.modules():
        for kind, name, fast in cuda.FAST:
            if isinstance(module, kind) and fast.__name__ in chosen:
                setattr(module, name, MethodType(fast, module))
    return network


def pixel_unet(shape: tuple, chosen: set[str] | None = None) -> torch.nn.Module:
    """Make a pixel U-Net on the GPU; chosen: its kernels, None: as users get it."""
    torch.manual_seed(0)
    with CUDA:
        if chosen is None:
            return build_pixel_unet(*shape[:2])
        return install(UNet(*shape[:2]), chosen).to(memory_format=CHANNELS_LAST)


def stable_diffusion_network(name: str, config, dtype: torch.dtype, plain: bool):
    """Make a network of NETWORKS with random weights; plain: without models/cuda.py's kernels."""
    with torch.device("meta"):
        network = NETWORKS[name][1](config)
    network = fill(network, CUDA, dtype).to(memory_format=CHANNELS_LAST)
    return network if plain else cuda.install(network)


def pixel_step(shape: tuple, chosen: set[str] | None = None) -> Step:
    size, batch = shape[2:]
    g = torch.Generator().manual_seed(2)
    x0 = torch.randn((batch, 3, size, size), generator=g).to(CUDA)
    one_pass = chosen is None or ONE_PASS in chosen
    return Step(pixel_unet(shape, chosen), x0, one_pass=one_pass)


def measure(name: str, call: Callable, batch: int, flops: float) -> dict:
    """Time a training step of `batch` images of `flops` forward each."""
    found = clock(call)
    rate = batch / found["ms"] * 1e3
    used = 3 * flops * rate
    share = used / ceiling()
    found |= {"img_s": rate, "tflops": used / 1e12, "mfu": share, "peak_gib": peak()}
    say(
        f"{name}: {found['ms']:.1f} ms a step (device {found['device_ms']:.1f}, host "
        f"{found['host_ms']:.1f}), {rate:.0f} img/s, MFU {share:.1%}, {found['peak_gib']:.1f} GiB"
    )
    return found


def ceiling() -> float:
    """Give the FLOP/s of a large matrix product here; an H100's before it is measured."""
    return results.get("ceilings", {}).get("matmul_tflops", 798.0) * 1e12


# --- sections ------------------------------------------------------------------------------------


def tests() -> dict:
    """The tests for GPUs; beside them, untimed, what Triton and torch.compile keep for the rest."""
    seconds = min(150.0, left() - 30)
    commands = {
        "tests": [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
                  "--tb=short", "tests"],
    }  # fmt: skip
    for what in ("kernels", "compiled"):
        if what == "kernels" or runs(what):
            tiny = ["--tiny"] * args.tiny
            commands[what] = [sys.executable, __file__, "--prewarm", what, *tiny]
    running = {}
    for name, command in commands.items():
        with open(OUT / f"{name}.txt", "w") as log:
            running[name] = subprocess.Popen(
                command, cwd=common.ROOT, stdout=log, stderr=log, start_new_session=True
            )
    found, deadline = {}, time.time() + seconds
    for name, process in running.items():
        try:
            found[name] = process.wait(max(0.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            found[name] = f"not done in {seconds:.0f} s"
        lines = (OUT / f"{name}.txt").read_text().splitlines()
        say(f"{name}: {found[name]}; {' / '.join(lines[-2:])[:300]}")
        for line in [line for line in lines if line.startswith("FAILED")][:12]:
            say(f"    {line[:200]}")
    return found


def ceilings() -> dict:
    """What the device can do: copy, multiply matrices, convolve at the network's shapes."""
    a = torch.ones(1 << (20 if args.tiny else 28), device=CUDA)
    b = torch.empty_like(a)
    found = {"copy_gb_s": 2 * a.nbytes / clock(lambda: b.copy_(a))["device_ms"] / 1e6}
    n = 256 if args.tiny else 8192
    a, b = (torch.randn(n, n, device=CUDA, dtype=BF16) for _ in range(2))
    found["matmul_tflops"] = 2 * n**3 / clock(lambda: a @ b)["device_ms"] / 1e9
    say(f"copy {found['copy_gb_s']:.0f} GB/s, matrix product {found['matmul_tflops']:.0f} TFLOP/s")
    for B, C, H in ((64, 128, 64), (64, 256, 32), (64, 512, 16), (64, 1024, 8), (2, 320, 64)):
        if args.tiny:
            B, C, H = 2, 16, 8
        x, y = (
            torch.randn(B, C, H, H, device=CUDA, dtype=BF16).to(memory_format=CHANNELS_LAST)
            for _ in range(2)
        )
        w = torch.randn(C, C, 3, 3, device=CUDA, dtype=BF16).to(memory_format=CHANNELS_LAST)

        def backward(x_too: bool, w_too: bool) -> None:
            torch.ops.aten.convolution_backward(
                y, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [x_too, w_too, False]
            )

        calls = (
            lambda: torch.nn.functional.conv2d(x, w, padding=1),
            lambda: backward(True, False),
            lambda: backward(False, True),
        )
        work = 2 * B * H * H * C * C * 9 / 1e9
        rates = [work / clock(call, 6, 2)["device_ms"] for call in calls]
        found[f"conv {B}x{C}@{H}"] = rates
        say(
            f"3x3 convolution, {B}x{C} @ {H}, forward / to x / to w: "
            f"{' / '.join(f'{rate:.0f}' for rate in rates)} TFLOP/s"
        )
    return found


def numbers() -> dict:
    """Loss and gradients against float32 on the CPU; the same bits twice, and as a graph."""
    found: dict = {}
    shape = (32, (1, 2, 4), 32, 8)
    side = pixel_step(shape, set())

    def gradients(chosen: set[str], device: torch.device, amp: torch.dtype | None):
        network = pixel_unet(shape, chosen).to(device)
        g = torch.Generator().manual_seed(3)
        for p in network.parameters():  # layers that start at zero would hide those before them
            p.data += 0.02 * torch.randn(p.shape, generator=g).to(device)
        given = side.recipe.inputs
        inputs = given.refilled(tuple(v.to(device) for v in given.tensors()))
        with torch.autocast(device.type, amp, enabled=amp is not None):
            loss = training_loss(network, *inputs).mean()
        loss.backward()
        return float(loss.detach()), torch.cat(
            [p.grad.double().cpu().flatten() for p in network.parameters()]
        )

    loss, wanted = gradients(set(), torch.device("cpu"), None)
    for which, chosen in both():
        for precision, amp, tf32 in (
            ("float32", None, False), ("float32, TF32", None, True), ("bf16", BF16, True),
        ):  # fmt: skip
            name = f"{which}, {precision}"
            with failing_alone(name, found):
                torch.backends.cudnn.allow_tf32 = tf32
                other, got = gradients(chosen, CUDA, amp)
                norm = wanted.norm() + 1e-12  # of nothing, on a device that computes nothing
                errors = [abs(other - loss) / (loss + 1e-12), float((got - wanted).norm() / norm)]
                found[name] = errors
                say(f"{name}: loss differs by {errors[0]:.1e}, gradients by {errors[1]:.1e}")
    torch.backends.cudnn.allow_tf32 = True

    def after(chosen: set[str], graph: bool) -> list[torch.Tensor]:
        """Give the weights after six steps."""
        step = pixel_step(shape, chosen)
        step.use_graph(graph)
        for _ in range(6):
            step()
        return list(step.network.parameters())

    def compare(name: str, chosen: set[str], graph: bool) -> None:
        with failing_alone(name, found):
            pairs = list(zip(after(chosen, False), after(chosen, graph)))
            differing = sum(not torch.equal(a, b) for a, b in pairs)
            largest = max(float((a - b).detach().abs().max()) for a, b in pairs)
            found[name] = {"differing": differing, "of": len(pairs), "largest": largest}
            say(f"{name}: {differing} of {len(pairs)} weights differ, by {largest:.1e} at most")

    for which, chosen in both():
        compare(f"{which}, eager twice", chosen, False)
        compare(f"{which}, eager and graph", chosen, True)
    torch.backends.cudnn.deterministic = True
    compare("plain, eager twice, cudnn.deterministic", set(), False)
    torch.backends.cudnn.deterministic = False
    return found


def both() -> list[tuple[str, set[str] | None]]:
    """List the sides: without the kernels, and as users get it."""
    return [("plain", set()), ("kernels", None)]


def train() -> dict:
    """Training steps of the pixel U-Net: plain and with kernels, eager and as a graph."""
    found: dict = {}
    for name in SHAPES:
        shape = shape_of(name)
        flops = flops_of(name)
        for which, chosen in both():
            if left() < 20:
                return found
            side = f"{name} {which}"
            with failing_alone(side, found):
                fresh()
                step = pixel_step(shape, chosen)
                for how in ("eager", "graph"):
                    step.use_graph(how == "graph")
                    fresh()
                    found[f"{side} {how}"] = measure(f"{side} {how}", step, step.batch, flops)
                step.use_graph(False)
                alone = clock(step.update_alone())
                found[f"{side} update"] = alone
                say(f"    of which the update, eager: {alone['device_ms']:.2f} ms")
            step = None
    return found


def switches() -> dict:
    """Each family of kernels alone, and all but it, in the largest training step."""
    found: dict = {}
    shape = shape_of(LARGEST)
    flops = flops_of(LARGEST)
    sides: dict[str, set[str] | None] = {"none": set()}
    sides |= {f"{name} alone": members for name, members in families().items()}
    sides |= {f"all but {name}": all_kernels() - one for name, one in families().items()}
    sides |= {"all": all_kernels(), "as users get it": None}
    for name, chosen in sides.items():
        if left() < 10:
            break
        with failing_alone(name, found):
            fresh()
            step = pixel_step(shape, chosen)
            found[name] = measure(f"{LARGEST}, {name}", step, step.batch, flops)
        step = None
    return found


def kernels_of(call: Callable) -> dict[str, list]:
    """Give {kernel or copy: [number, milliseconds in all]} of a call, from the device's own clock."""
    rows: dict[str, list] = {}
    device = [ProfilerActivity.CUDA]
    for activities in (device, [ProfilerActivity.CPU, *device]):  # without the CPU's if it can be
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as recorded:
            call()
            torch.cuda.synchronize()
        for event in recorded.events():
            on_device = event.device_type == torch.autograd.DeviceType.CUDA
            if on_device and not getattr(event, "is_user_annotation", False):
                row = rows.setdefault(event.name, [0, 0.0])
                row[0] += 1
                row[1] += event.time_range.elapsed_us() / 1e3
        if rows:
            break
    return rows


def profile() -> dict:
    """A training step by kernel, plain and with kernels."""
    found = {}
    for name, rows_shown in ((LARGEST, 14), ("32px_dim64_B128", 5)):
        for which, chosen in both():
            fresh()
            step = pixel_step(shape_of(name), chosen)
            for _ in range(3):
                step()
            torch.cuda.synchronize()
            rows = kernels_of(step)
            ordered = sorted(rows.items(), key=lambda item: -item[1][1])
            busy, count = (sum(row[i] for row in rows.values()) for i in (1, 0))
            kept = {kernel[:160]: row for kernel, row in ordered[:80]}
            found[f"{name} {which}"] = {"busy_ms": busy, "kernels": count, "rows": kept}
            say(f"{name} {which}: device busy {busy:.1f} ms in {count} kernels and copies")
            for kernel, (calls, ms) in ordered[:rows_shown]:
                say(f"    {ms:7.2f} ms x{calls:4d} {kernel[:100]}")
            step = None
    return found


def pipeline(network, config: Config, codec, conditioning) -> Pipeline:
    schedule = make_schedule("cosine", 1000)
    return Pipeline(
        config, network.eval().requires_grad_(False), schedule, codec, conditioning, CUDA
    )


def sampling() -> dict:
    """Pictures a second of the pixel U-Net, from noise to pixels in the host's memory."""
    found: dict = {}
    dim, mults, size, _ = shape_of("32px_dim64_B128")
    config = Config(image_size=size, unet_dim=dim, dim_mults=mults)
    pipelines = {
        which: pipeline(pixel_unet((dim, mults), chosen), config, PixelCodec(CUDA), Unconditional())
        for which, chosen in both()
    }
    one = pipelines["plain"]
    found["first_ms"] = 1e3 * seconds_of(lambda: one.network(NOTHING, BF16), 5)
    say(f"preparing the network, at each call of sample(): {found['first_ms']:.1f} ms")
    for n in (1, 16, 128):
        for sampler, steps in (("ddim", 50), (DEFAULT_SAMPLER, DEFAULT_STEPS)):
            row = found[f"{n} {sampler} {steps}"] = {}
            for which, one in pipelines.items():
                for how, graph in (("eager", False), ("graph", True)):
                    if left() < 15:
                        return found
                    with failing_alone(f"{which} {how}", row):
                        options = dict(sampler=sampler, steps=steps, cuda_graph=graph)
                        call = lambda: one.sample(range(n), **options).cpu()
                        row[f"{which} {how}"] = n / seconds_of(call)
            say(f"{n} images, {sampler} at {steps} steps, img/s: {rates(row)}")
    for one in pipelines.values():
        one.forget()
    return found


def rates(row: dict) -> str:
    numbers = {name: value for name, value in row.items() if isinstance(value, float)}
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())


def small_stable_diffusion() -> tuple[UNetConfig, VAEConfig, CLIPTextConfig]:
    """Give the sizes to try the program out with."""
    return (
        UNetConfig(
            block_out_channels=(32, 32), norm_num_groups=8, layers_per_block=1, sample_size=8,
            cross_attention_dim=32, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        VAEConfig(block_out_channels=(16, 16), norm_num_groups=8, layers_per_block=1),
        CLIPTextConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=514, eos_token_id=513,
        ),
    )  # fmt: skip


def full_stable_diffusion() -> tuple[UNetConfig, VAEConfig, CLIPTextConfig]:
    return UNetConfig(), VAEConfig(), CLIPTextConfig()


def sd_sampling() -> dict:
    """Stable Diffusion 1.5 at 512 px with random weights: its parts, and whole pictures."""
    found: dict = {}
    sizes = small_stable_diffusion() if args.tiny else full_stable_diffusion()
    side = sizes[0].side
    for which, plain in (("plain", True), ("kernels", False)):
        with failing_alone(which, found), torch.inference_mode():
            fresh()
            with torch.inference_mode(False):  # a pipeline folds weights made in it at every call
                unet, vae, text = (
                    stable_diffusion_network(name, config, BF16, plain)
                    for name, config in zip(("unet", "vae", "text_encoder"), sizes)
                )
            row = found[which] = {}
            for B in (2, 8):
                x = torch.randn(B, 4, side, side, device=CUDA, dtype=BF16)
                x = x.to(memory_format=CHANNELS_LAST)
                t = torch.full((B,), 500.0, device=CUDA)
                context = torch.randn(B, 77, sizes[0].cross_attention_dim, device=CUDA, dtype=BF16)
                run = lambda x, t, context: (unet(x, t, Cond(context)),)
                eager = clock(lambda: run(x, t, context))
                graph = Graph(run, (x, t, context))
                replay = clock(graph.graph.replay)["device_ms"]
                rate = SD_FLOPS * B / replay / 1e9
                row[f"unet, batch {B}"] = {"eager": eager, "graph_ms": replay, "tflops": rate}
                say(
                    f"{which}: U-Net, batch {B}: eager {eager['ms']:.2f} ms (host "
                    f"{eager['host_ms']:.2f}), graph {replay:.2f} ms, {rate:.0f} TFLOP/s"
                )
                del graph
            z = torch.randn(1, 4, side, side, device=CUDA, dtype=BF16)
            row["vae"] = clock(lambda: vae.decode(z))
            say(f"{which}: VAE, one picture decoded: {row['vae']['ms']:.2f} ms")
            config = Config(
                mode="latent", condition="text", objective="eps", sd_path="none",
                image_size=side * vae.factor,
            )  # fmt: skip
            prompts = Prompts(byte_level(77), text, device=CUDA)
            whole = pipeline(unet, config, LatentCodec(vae, CUDA), prompts)
            for steps in (20, 50):
                options = dict(
                    sampler="ddim", steps=steps, prompts=["a"], guidance_scale=7.5, cuda_graph=True
                )
                seconds = seconds_of(lambda: whole.sample(range(1), **options).cpu())
                row[f"picture, {steps} steps"] = {"seconds": seconds, "it_s": steps / seconds}
                say(
                    f"{which}: a picture of {steps} guided steps as graphs, from the prompt to "
                    f"pixels: {seconds:.2f} s, {steps / seconds:.1f} it/s"
                )
            whole.forget()
        unet = vae = text = whole = None
    return found


def sd_training() -> dict:
    """Stable Diffusion 1.5's U-Net trained on latents, batch 8: AdamW and EMA, bf16 autocast."""
    found: dict = {}
    sizes = small_stable_diffusion() if args.tiny else full_stable_diffusion()
    config = sizes[0]
    B = 2 if args.tiny else 8
    for which, plain in (("plain", True), ("kernels", False)):
        if left() < 20:
            break
        with failing_alone(which, found):
            fresh()
            unet = stable_diffusion_network("unet", config, torch.float32, plain)
            unet.train().requires_grad_(True)
            x0 = torch.randn(B, 4, config.side, config.side, device=CUDA)
            context = torch.randn(B, 77, config.cross_attention_dim, device=CUDA)
            step = Step(unet, x0, Cond(context), one_pass=not plain)
            for how in ("eager", "graph"):
                step.use_graph(how == "graph")
                fresh()
                name = f"SD 1.5, batch {B}, {which} {how}"
                found[f"{which} {how}"] = measure(name, step, B, SD_FLOPS)
        unet = step = None
    return found


def compiled() -> dict:
    """The largest training step through torch.compile, plain and with kernels."""
    found: dict = {}
    shape = shape_of(LARGEST)
    flops = flops_of(LARGEST)
    ready = args.prewarm or results.get("tests", {}).get("compiled") == 0
    for which, chosen in reversed(both()):
        if left() < (30 if ready else 130):  # what is in no cache takes a minute or two
            say(f"{which}: left out, {left():.0f} s are left")
            break
        with failing_alone(which, found):
            fresh()
            step = pixel_step(shape, chosen)
            step.network.compile(dynamic=False)
            began = time.time()
            step()
            torch.cuda.synchronize()
            took = time.time() - began
            name = f"{LARGEST} {which} compiled"
            found[which] = {"compile_s": took} | measure(name, step, step.batch, flops)
            step.use_graph(True)
            found[f"{which} graph"] = measure(f"{name}, as a graph", step, step.batch, flops)
            say(f"    compiled in {took:.0f} s{', from the cache' if ready else ''}")
        step = None
    return found


def prewarm(what: str) -> None:
    """Fill the caches of Triton, or of torch.compile: run what is measured once, with no clock."""
    sections = {"kernels": (numbers, train, sampling, sd_sampling, sd_training)}
    for section in sections.get(what, (compiled,)):
        section()


def end_to_end() -> dict:
    """train.py and sample.py as users run them, on the toy set that comes with the program."""
    found: dict = {}
    small = args.tiny
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        training = ["train.py", "--save_folder", run, "--cache_dir", f"{folder}/cache",
                    "--train_steps", "6" if small else "600", "--log_every", "2" if small else "50"]  # fmt: skip
        drawing = ["sample.py", "--load_path", f"{run}/model.pt", "--save_folder", f"{folder}/out",
                   "--num_images", "4" if small else "512", "--batch_size", "4" if small else "128"]  # fmt: skip
        for name, command in (("train", training), ("sample", drawing)):
            began = time.time()
            done = subprocess.run([sys.executable, *command], cwd=common.ROOT, text=True,
                                  capture_output=True, timeout=max(10.0, left()))  # fmt: skip
            printed = (done.stdout + done.stderr).replace("\r", "\n").splitlines()
            printed = [line for line in printed if line.strip() and "%|" not in line]  # no bars
            first = printed[:8]
            found[name] = {
                "seconds": time.time() - began,
                "status": done.returncode,
                "first": first,
            }
            say(f"{command[0]}: {found[name]['seconds']:.1f} s, status {done.returncode}")
            for line in first if not done.returncode else printed[-6:]:
                say(f"    {line[:160]}")
            if name == "train" and Path(run, "metrics.jsonl").exists():
                lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
                found["lines"] = [
                    {k: line.get(k) for k in ("step", "loss", "img_per_s")} for line in lines
                ]
                say(f"    {found['lines'][0]} ... {found['lines'][-1]}")
            with contextlib.suppress(OSError):
                shutil.copy(f"{folder}/out/grid.png", OUT / "grid.png")
    return found


def peers() -> dict:
    """lucidrains' and diffusers' training steps and sampling, as shipped and tuned as ours is; and ours.

    64 px and batch 64, or 16 images of 32 px by DDIM in 50 steps. The widths make all forward passes
    cost the same: lucidrains' 128 and 64 what common.equal_costs gives for the others.
    """
    import train_step

    sys.path.insert(0, str(Path(__file__).parent))  # before the scripts: one is named alike
    import sample

    told = dict(device="cuda", mults=(1, 2, 4, 8), compile=False, steps=50)
    trained = argparse.Namespace(**told, dim=128, size=64, batch_size=64)
    drawn = argparse.Namespace(**told, dim=64, size=32)
    ours, theirs, ours_drawn, theirs_drawn = 112, 168, 56, 88
    if args.tiny:
        for one in (trained, drawn):
            vars(one).update(dim=8, size=32, batch_size=2, steps=2)
        ours, theirs, ours_drawn, theirs_drawn = 8, 32, 8, 32

    def ours_as_graph():
        step = train_step.ours(trained, ours)
        step.use_graph(True)
        return step

    sides = {
        "ours": ours_as_graph,
        "ours, 16 images": lambda: sample.ours(drawn, ours_drawn, 16, cuda_graph=True),
    }
    for how, dtype in (("tuned", BF16), ("shipped", None)):
        tuned = dtype is not None
        sides |= {
            f"lucidrains {how}": partial(train_step.lucidrains, trained, tuned),
            f"diffusers {how}": partial(train_step.diffusers, trained, theirs, tuned),
            f"lucidrains {how}, 16 images": partial(sample.lucidrains, drawn, 16, dtype),
            f"diffusers {how}, 16 images": partial(
                sample.diffusers, drawn, theirs_drawn, 16, dtype
            ),
        }
    found: dict = {}
    for name, build in sides.items():
        if left() < 15:
            break
        with failing_alone(name, found):
            fresh()
            call = build()
            drawing = name.endswith("images")
            seconds = seconds_of(call, 1) if drawing else clock(call, 6)["ms"] / 1e3
            rate = (16 if drawing else trained.batch_size) / seconds
            found[name] = {"seconds": seconds, "img_s": rate, "peak_gib": peak()}
            say(f"{name}: {1e3 * seconds:.1f} ms, {rate:.1f} img/s, {peak():.1f} GiB")
        call = None
    return found


SECTIONS: dict[str, tuple[Callable, int]] = {  # by worth; the seconds that each needs at least
    "tests": (tests, 100),
    "ceilings": (ceilings, 10),
    "numbers": (numbers, 15),
    "train": (train, 40),
    "switches": (switches, 20),
    "sampling": (sampling, 40),
    "sd_sampling": (sd_sampling, 30),
    "sd_training": (sd_training, 25),
    "profile": (profile, 20),  # here, as launches are slower after it
    "end_to_end": (end_to_end, 40),
    "compiled": (compiled, 40),
    "peers": (peers, 25),
}


def runs(name: str) -> bool:
    return not args.only or name in args.only


def alive() -> bool:
    """Tell whether the device still answers: after a kernel's bad access no call of this process does."""
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()
        return torch.ones(1, device=CUDA).cpu() is not None
    return False


def start_again(rest: list[str]) -> None:
    """Run what is left in a new process, in place of this one; returns if nothing is left."""
    say(f"the device answers no more: a new process for {', '.join(rest) or 'nothing'}")
    if rest:
        told = ["--seconds", str(args.seconds), "--only", ",".join(rest), *["--tiny"] * args.tiny]
        os.execv(sys.executable, [sys.executable, __file__, *told, "--append"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=480.0, help="in all, at most")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[],
                        help=f"sections, of {','.join(SECTIONS)}")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="try the program out")
    parser.add_argument("--append", action="store_true", help="to the results that are there")
    parser.add_argument("--prewarm", choices=("kernels", "compiled"), help="only fill the caches")
    parser.parse_args(namespace=args)
    unknown = set(args.only) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown sections {unknown}; there are {', '.join(SECTIONS)}")
    setup("cuda")
    if args.prewarm:
        prewarm(args.prewarm)
        return
    signal.alarm(max(1, int(left()) + 20))  # the end of whatever hangs
    OUT.mkdir(parents=True, exist_ok=True)
    if args.append and (OUT / "lease.json").exists():
        results.update(json.loads((OUT / "lease.json").read_text()))
    results["machine"] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "commit": common.commit(),
        "kernels": list(families()),
    }
    say(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    chosen = [name for name in SECTIONS if runs(name)]
    for i, name in enumerate(chosen):
        section, needed = SECTIONS[name]
        if left() < needed:
            say(f"--- {name}: left out, it needs {needed} s and {left():.0f} are left")
            continue
        began = time.time()
        with failing_alone(name, results):
            fresh()
            results[name] = section()
        took = time.time() - began
        say(f"--- {name}: {took:.0f} s")
        results.setdefault("seconds", {})[name] = took
        (OUT / "lease.json").write_text(json.dumps(results, indent=1, default=str))
        if not alive():
            start_again(chosen[i + 1 :])
            return


if __name__ == "__main__":
    main()
