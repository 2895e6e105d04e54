"""Mixed precision: which floating-point type the networks compute in."""

import torch

from .. import UserError

# instructions that multiply bf16 faster than float32, and what tells of them in torch.cpu
PRODUCTS = {"amx": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}


def bf16_products() -> str | None:
    """Name the CPU's instructions for products of bf16; None: it has none, or too old a torch."""
    for name, check in PRODUCTS.items():
        if getattr(torch.cpu, check, lambda: False)():
            return name
    return None


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype that --amp means on a device; None means float32.

    auto: bf16 on CUDA from sm_80 and on CPUs with AMX or avx512_bf16 (which train 1.3 to 1.9 times
    as fast by it, docs/log.md), fp16 on older CUDA, else float32.
    Raises UserError for fp16 on a CPU.
    """
    if amp == "auto":
        if device.type == "cuda":
            new = torch.cuda.get_device_capability(device) >= (8, 0)
            return torch.bfloat16 if new else torch.float16
        return torch.bfloat16 if device.type == "cpu" and bf16_products() else None
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; on a CPU use auto, bf16 or no")
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def describe(amp: str, device: torch.device) -> str:
    """Say in which precision a network computes, and on a CPU why."""
    dtype = amp_dtype(amp, device)
    name = str(dtype).removeprefix("torch.") if dtype else "float32"
    if amp != "auto" or device.type != "cpu":
        return name
    return f"{name} (this CPU has {bf16_products() or 'no fast products of bf16'})"
