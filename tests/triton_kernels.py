"""Compare Triton kernels with the plain layers: `python triton_kernels.py cpu` or `cuda`.

Run in a process of its own: on the CPU TRITON_INTERPRET=1 has to be set before triton is imported.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion.models.layers import WSConv3x3

HALVES = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # how far a dtype's result may be off


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Compare within a fraction of the largest number: small ones are differences of large ones."""
    assert got.dtype != torch.float64 and got.shape == want.shape
    atol = tolerance * max(want.abs().max().item(), 0.1)
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=atol)


def plain_attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """LinearAttention.attend, in float64."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, 2))
    context = k.softmax(2).mT @ v
    return (q.softmax(3) @ context).transpose(1, 2).flatten(2)


def check_linear_attention(device: str) -> None:
    from diffusion.models.triton_attention import fits, linear_attention

    def compare(B, N, heads, D, dtype, spread=1.0):
        torch.manual_seed(N)
        qkv = torch.randn(B, N, 3 * heads * D) * spread
        qkv[..., -heads * D :] = torch.randn(B, N, heads * D) + 0.5  # v, not centred
        grad = torch.randn(B, N, heads * D).to(dtype)
        x = qkv.to(dtype).to(device).requires_grad_()
        want_x = x.detach().cpu().double().requires_grad_()
        out = linear_attention(x, heads)
        want = plain_attention(want_x, heads)
        out.backward(grad.to(device))
        want.backward(grad.double())
        assert out.dtype == x.grad.dtype == dtype
        tolerance = HALVES.get(dtype, 1e-5)
        assert_near(out.detach().cpu(), want.detach(), tolerance)
        parts = zip("qkv", x.grad.cpu().chunk(3, 2), want_x.grad.chunk(3, 2))
        for name, got, expected in parts:
            try:
                assert_near(got, expected, tolerance)
            except AssertionError as error:
                raise AssertionError(f"gradient of {name}, {(B, N, heads, D, dtype)}") from error

    if device == "cpu":  # a GPU multiplies float32 as TF32; `fits` keeps it away
        compare(2, 37, 2, 16, torch.float32)  # fewer rows than a tile
        compare(1, 1, 1, 32, torch.float32)
        compare(1, 300, 2, 16, torch.float32)  # three tiles, the last not full
        compare(1, 257, 1, 32, torch.float32, spread=50)  # exponentials overflow
    compare(1, 257, 1, 32, torch.bfloat16, spread=50)
    compare(1, 333, 1, 64, torch.bfloat16)
    compare(1, 300, 2, 16, torch.bfloat16)
    compare(1, 256, 2, 32, torch.float16)
    compare(1, 64, 1, 128, torch.bfloat16)
    if device == "cuda":
        for size, D in ((64, 16), (64, 32), (32, 64), (16, 128)):
            for dtype in HALVES:
                compare(3, size * size, 4, D, dtype)

    halves = torch.empty(1, 1024, 3 * 64, dtype=torch.bfloat16)
    assert fits(halves, 4) and fits(halves.expand(4, -1, -1), 4)
    assert not fits(halves.float(), 4) and not fits(halves, 1) and not fits(halves, 8)


def plain_norm(x, norm, film, residual, silu):
    """GroupNorm, FiLM, SiLU and the sum, as unet.Block does them."""
    x = norm(x)
    if film is not None:
        scale, shift = film[:, :, None, None].chunk(2, 1)
        x = x * (1 + scale) + shift
    x = F.silu(x) if silu else x
    return x if residual is None else x + residual


def check_norm(device: str) -> None:
    from diffusion.models.triton_norm import norm_act

    def compare(
        shape, groups, dtype, film=False, residual=False, silu=True, offset=0.0, longer=False
    ):
        torch.manual_seed(shape[1])
        B, C = shape[:2]
        norm = torch.nn.GroupNorm(groups, C)
        for p in norm.parameters():
            torch.nn.init.normal_(p)
        given = [torch.randn(shape) + offset]
        given += [torch.randn(B, 2 * C)] if film else []
        given += [torch.randn(shape)] if residual else []
        given = [v.to(dtype) for v in given]
        given = [v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for v in given]
        grad = torch.randn(shape).to(dtype)

        def both(function, inputs, norm, grad):
            x, *rest = inputs = [v.requires_grad_() for v in inputs]
            options = dict(
                film=rest.pop(0) if film else None, residual=rest.pop() if residual else None
            )
            y = function(x, norm, silu=silu, **options)
            return y, *torch.autograd.grad(y, (*inputs, *norm.parameters()), grad)

        on_device = [v.detach().to(device) for v in given]
        if longer:  # as part of what one product makes for all blocks
            on_device[1] = F.pad(on_device[1], (3, 5)).narrow(1, 3, 2 * C)
        got = both(norm_act, on_device, copy.deepcopy(norm).to(device), grad.to(device))
        exact = [v.double() for v in given]
        want = both(plain_norm, exact, norm.double(), grad.double())
        assert got[0].dtype == dtype and got[0].is_contiguous(memory_format=torch.channels_last)
        tolerance = HALVES.get(dtype, 2e-5)
        for name, a, b in zip(("y", *"abcde"), got, want, strict=False):
            try:
                assert_near(a.detach().cpu(), b.detach(), tolerance)
            except AssertionError as error:
                raise AssertionError(f"{name} of {(shape, groups, dtype)}") from error

    compare((2, 16, 6, 7), 8, torch.float32, film=True, residual=True)
    compare((3, 20, 5, 6), 2, torch.float32, film=True, offset=50)  # a mean far from 0
    compare((1, 24, 9, 10), 1, torch.float32, silu=False)
    compare((2, 320, 3, 4), 32, torch.float32, residual=True)  # groups of 10
    compare((5, 8, 33, 34), 8, torch.float32, film=True)
    compare((2, 16, 90, 92), 2, torch.float32, film=True, residual=True)  # more than one part
    compare((2, 64, 1, 1), 8, torch.float32)
    compare((3, 16, 6, 7), 8, torch.float32, film=True, longer=True)
    compare((2, 128, 8, 8), 8, torch.bfloat16, film=True, residual=True)
    compare((2, 32, 8, 8), 8, torch.float16, film=True, residual=True)


def check_images(device: str) -> None:
    from diffusion.models.triton_images import add, upsample

    def compare(shape, dtype):
        torch.manual_seed(shape[1])
        x = torch.randn(shape).to(memory_format=torch.channels_last)
        bias = torch.randn(shape[1])

        def both(x, bias, own):
            if own:
                y = upsample(add(x, bias))
            else:
                y = F.interpolate(x + bias[:, None, None], scale_factor=2, mode="nearest")
            weights = torch.arange(y.numel()).view(y.shape).to(y) / y.numel() - 0.2
            return y, *torch.autograd.grad(y, (x, bias), weights)

        given = [v.to(device).requires_grad_() for v in (x.to(dtype), bias)]
        exact = [v.detach().cpu().double().requires_grad_() for v in given]
        for got, want in zip(both(*given, True), both(*exact, False), strict=True):
            assert_near(got.detach().cpu(), want.detach(), HALVES.get(dtype, 1e-5))

    compare((2, 5, 3, 4), torch.float32)
    compare((3, 160, 2, 7), torch.float32)  # more channels than a tile
    compare((1, 8, 40, 33), torch.float32)  # more rows than a tile
    compare((2, 32, 8, 8), torch.bfloat16)


def check_weights(device: str) -> None:
    from diffusion.models.triton_weights import standardised

    def compare(C_out, C_in, dtype, layout, mean=0.01, std=0.01):
        torch.manual_seed(C_in)
        conv = WSConv3x3(C_in, C_out)
        weight = (conv.weight.detach() / 0.01 * std + mean).to(memory_format=layout)
        weight[0] = mean  # a filter without variance
        weight = weight.to(device).requires_grad_()
        conv.weight = torch.nn.Parameter(weight.detach().cpu())
        grad = torch.randn(conv.weight.shape).to(dtype)
        out = standardised(weight, dtype)
        out.backward(grad.to(device))
        want = conv.standardised()
        want.backward(grad.float())
        assert out.dtype == dtype and weight.grad.dtype == torch.float32
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert weight.grad.is_contiguous(memory_format=layout)
        tolerance = HALVES.get(dtype, 2e-5)
        assert_near(out.detach().cpu(), want.detach(), tolerance)
        for got, expected in zip(weight.grad.cpu(), conv.weight.grad):
            assert_near(got, expected, 2e-5)

    conv = WSConv3x3(64, 2).to(torch.bfloat16)
    got = standardised(conv.weight.to(device), torch.float32).cpu()
    assert_near(got, conv.standardised(), 2e-5)  # weights of 16 bits, sums of 32
    compare(3, 8, torch.float32, torch.channels_last)
    compare(3, 5, torch.float32, torch.contiguous_format)
    compare(2, 7, torch.float16, torch.channels_last)
    compare(2, 500, torch.bfloat16, torch.channels_last, mean=1.0)
    if device == "cuda":
        for C_in in (64, 192, 512, 1024, 2048):
            compare(8, C_in, torch.bfloat16, torch.channels_last)


def teach_bfloat16() -> None:
    """Let the interpreter round to bfloat16, not cut off, and multiply it, not its bits."""
    import numpy as np
    from triton.runtime import interpreter

    def convert(x, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            halves = torch.tensor(np.ascontiguousarray(x)).bfloat16()
            return halves.view(torch.int16).numpy().view(np.uint16)
        return plain_convert(x, source, target, rounding)

    def dot(self, a, b, *args):
        if a.dtype == b.dtype == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return plain_dot(self, a, b, *args)

    plain_convert = interpreter._convert_float
    plain_dot = interpreter.InterpreterBuilder.create_dot
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


if __name__ == "__main__":
    if sys.argv[1] == "cpu":
        teach_bfloat16()
    for check in (check_norm, check_images, check_linear_attention, check_weights):
        check(sys.argv[1])
