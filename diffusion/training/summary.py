"""What `train.py --dry_run` prints: configuration, size, cost and data of a run."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..config import Config
from ..data.batches import open_batches
from ..pipeline import build_model
from .base import based_on
from .steps import rank_share, total_steps


def forward_cost(config: Config, num_classes: int) -> tuple[int, int, int]:
    """(parameters, forward FLOPs, bytes kept for backward) of one image, from running one.

    In float32 on the CPU. One multiply-add is two FLOPs.
    """
    model = build_model(config, num_classes)
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses unique

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage
        return tensor

    x = torch.zeros(1, 3, config.image_size, config.image_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with FlopCounterMode(display=False) as counter:
            model(x, torch.zeros(1))
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, counter.get_total_flops(), sum(s.nbytes() for s in kept.values())


def describe(config: Config, given: set[str] | None = None) -> str:
    config = based_on(config, given)
    data = open_batches(config)
    share = rank_share(config)
    total = total_steps(config, data.length)
    parameters, flops, activations = forward_cost(config, len(data.classes))
    fixed = parameters * 4 * 5  # weights, gradients, two moments, EMA; float32
    epochs = f" ({total * config.batch_size / data.length:.1f} epochs)" if data.length else ""
    return "\n".join([
        config.to_json(),
        f"data: {config.data}, {data.describe()}",
        f"length: {total:,} steps of {config.batch_size}{epochs}",
        f"network: {parameters:,} parameters, {flops / 1e9:.3f} GFLOP forward per image",
        f"memory: about {fixed / 1e9:.2f} GB for weights, gradients, Adam and EMA, and "
        f"{share.micro * activations / 1e9:.2f} GB for the activations of a micro-batch of "
        f"{share.micro} in float32 (about half in bf16)",
    ])  # fmt: skip
