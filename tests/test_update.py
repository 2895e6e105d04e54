"""The update of all weights in one pass over memory does what AdamW, clipping and EMA do.

Run as a program, `python test_update.py cpu` or `cuda`, it compares; the tests do so in a process of
its own, because TRITON_INTERPRET=1 has to be set before triton is imported.
"""

import copy
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion.training.ema import EMA
from diffusion.training.optimizer import AdamW, flat

LR, DECAY, BETA1, BETA2, EPS = 0.01, 0.1, 0.9, 0.99, 1e-8


def run(device: str, interpret: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__, device],
        env=os.environ | {"TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_update_in_the_interpreter():
    run("cpu", "1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_update_on_the_device():
    run("cuda", "0")


class Weights(torch.nn.Module):
    """Weights of odd sizes, of whole blocks, of all layouts."""

    def __init__(self):
        super().__init__()
        sizes = [(1,), (3,), (1000,), (4097,), (2, 1024), ()]
        self.list = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(s)) for s in sizes)
        self.conv = torch.nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        self.turned = torch.nn.Parameter(torch.randn(5, 7).T)
        self.frozen = torch.nn.Parameter(torch.randn(3), requires_grad=False)


class Run:
    """A model, its optimizer, its averages, and what it has seen, in float64 by the formulas."""

    def __init__(self, device: str):
        torch.manual_seed(0)
        self.model = Weights().to(device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = AdamW(self.trained, LR, betas=(BETA1, BETA2), weight_decay=DECAY)
        if not torch.is_tensor(self.optimizer.param_groups[0]["lr"]):
            self.optimizer.param_groups[0]["lr"] = torch.tensor(LR)  # as on a GPU
        self.ema = EMA(self.model, 0.99)
        self.exact = [flat(p.detach(), p).double() for p in self.trained]
        self.averages = copy.deepcopy(self.exact)
        self.moments = [[torch.zeros_like(p) for p in self.exact] for _ in range(2)]
        self.count = 0

    def gradients(self, n: int, misaligned: bool = False) -> list[torch.Tensor]:
        """Those of step n; misaligned: not from a tensor's start, as DistributedDataParallel's."""
        generator = torch.Generator().manual_seed(n)
        for p in self.trained:
            memory = torch.randn(p.numel() + misaligned, generator=generator).to(p.device)
            p.grad = memory.as_strided(p.shape, p.stride(), int(misaligned))
        return self.optimizer.take_gradients()

    def expect(self, gradients: list[torch.Tensor], n: int, clip: float) -> None:
        """Step in float64."""
        self.count += 1
        weight = 1 - min(0.99, (1 + n) / (10 + n))
        moments = zip(*self.moments)
        for w, e, (m, v), g in zip(self.exact, self.averages, moments, gradients):
            g = clip * g.double()
            m.copy_(BETA1 * m + (1 - BETA1) * g)
            v.copy_(BETA2 * v + (1 - BETA2) * g**2)
            w *= 1 - LR * DECAY
            mean, square = m / (1 - BETA1**self.count), v / (1 - BETA2**self.count)
            w -= LR * mean / (square.sqrt() + EPS)
            e += weight * (w - e)

    def compare(self) -> None:
        near = dict(rtol=1e-5, atol=1e-6, check_dtype=False)
        assert_close([flat(p.detach(), p) for p in self.trained], self.exact, **near)
        assert_close([flat(e, e) for e in self.ema.ema], self.averages, **near)
        states = [self.optimizer.state[p] for p in self.optimizer.param_groups[0]["params"]]
        assert [float(state["step"]) for state in states] == [self.count] * len(states)
        assert_close([state["exp_avg"] for state in states], self.moments[0], **near)
        assert_close([state["exp_avg_sq"] for state in states], self.moments[1], **near)

    def everything(self) -> bytes:
        """All bits that a step may change."""
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.ema.model.state_dict(), self.optimizer.state_dict()], file)  # fmt: skip
        return file.getvalue()


def check_steps(device: str) -> None:
    from diffusion.training.triton_update import Update

    run = Run(device)
    update = Update(run.optimizer, run.ema)

    def step(n: int, clip: float = 0.25, ok: bool = True, misaligned: bool = False) -> None:
        gradients = run.gradients(n, misaligned)
        run.ema.begin(n)
        before = run.everything()
        if ok:
            run.expect(gradients, n, clip)
        else:
            max(gradients, key=len)[5] = float("inf")
        update(gradients, torch.tensor(ok, device=device), torch.tensor(clip, device=device))
        assert ok or run.everything() == before
        run.compare()

    step(0, ok=False)  # before any other: the step count is still 0
    step(1)
    step(2, ok=False)
    step(3, misaligned=True)
    step(4, clip=1.0)

    # what is loaded is found, wherever it lies
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    step(5)


def check_checkpoint(device: str) -> None:
    """A run may go on without the kernel, and one without it goes on with it."""
    from diffusion.training.triton_update import Update

    ok, clip = torch.tensor(True, device=device), torch.tensor(1.0, device=device)
    fast, plain = Run(device), Run(device)
    update = Update(fast.optimizer, fast.ema)

    def step(run: Run, n: int, with_kernel: bool) -> None:
        gradients = run.gradients(n)
        run.ema.begin(n)
        if with_kernel:
            update(gradients, ok, clip)
        else:
            run.optimizer.step()
            run.ema.update(ok)

    for n in range(3):
        step(fast, n, True)
        step(plain, n, False)
    file = io.BytesIO()
    states = [run.optimizer.state_dict() for run in (fast, plain)]
    assert_close(states[0]["state"], states[1]["state"], rtol=1e-5, atol=1e-6)
    torch.save(states, file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    plain.optimizer.load_state_dict(states[0])
    fast.optimizer.load_state_dict(states[1])
    step(fast, 3, True)
    step(plain, 3, False)
    step(fast, 4, False)
    step(plain, 4, False)
    step(fast, 5, True)
    step(plain, 5, False)
    for a, b in zip((*fast.trained, *fast.ema.ema), (*plain.trained, *plain.ema.ema)):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


def check_graph(device: str) -> None:
    """A captured step does what steps one by one do."""
    from diffusion.training.triton_update import Update

    runs = [Run(device), Run(device)]
    clip = torch.tensor(1.0, device=device)
    ok = torch.tensor(True, device=device)
    given = runs[0].gradients(0)

    def step_of(run):
        update = Update(run.optimizer, run.ema)
        run.ema.begin(3)
        return lambda: update([g * 2 for g in given], ok, clip)  # addresses of their own

    steps = [step_of(run) for run in runs]
    for _ in range(6):
        steps[0]()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            steps[1]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps[1]()
    for n in range(5):
        ok.fill_(n != 2)
        graph.replay()
    assert_close(runs[0].trained, runs[1].trained, rtol=0, atol=0)
    assert_close(runs[0].ema.ema, runs[1].ema.ema, rtol=0, atol=0)


if __name__ == "__main__":
    device = sys.argv[1]
    check_steps(device)
    check_checkpoint(device)
    if device == "cuda":
        check_graph(device)
