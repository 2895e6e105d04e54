"""Mixed precision: which floating-point type the networks compute in."""

import torch

from .. import UserError


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype that --amp means on a device; None means float32.

    auto: bf16 on CUDA from sm_80 and on CPUs with AMX, fp16 on older CUDA, else float32.
    Raises UserError for fp16 on a CPU.
    """
    if amp == "auto":
        if device.type == "cuda":
            new = torch.cuda.get_device_capability(device) >= (8, 0)
            return torch.bfloat16 if new else torch.float16
        amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        return torch.bfloat16 if device.type == "cpu" and amx() else None
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; on a CPU use auto, bf16 or no")
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
