"""Tell faults of the machine from faults of what it was given: both may be RuntimeErrors."""

import torch

GPU_FAULTS = ("CUDA error", "CUDA out of memory", "CUDA driver", "CUBLAS_STATUS", "CUDNN_STATUS")
COMPILERS = ("torch._dynamo", "torch._inductor", "triton")


def is_out_of_memory(error: BaseException) -> bool:
    """Check for an out-of-memory error, of a GPU or of the machine."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def is_of_gpu(error: BaseException) -> bool:
    """Check for an error of a GPU: no file is to blame for it."""
    known = isinstance(error, torch.OutOfMemoryError)
    return known or any(sign in str(error) for sign in GPU_FAULTS)


def explain(error: BaseException) -> str | None:
    """Describe a fault of the machine in one line; None for an error of another kind."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    if type(error).__module__.startswith(COMPILERS):
        return f"torch.compile failed: leave out --compile ({said[0][:300]})"
    if is_out_of_memory(error):
        return "out of memory: take fewer or smaller images at a time, such as by --batch_size"
    return f"the GPU failed ({said[0][:300]})" if is_of_gpu(error) else None
