"""Describe a run without starting it, for `train.py --dry_run`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from .. import UserError
from ..config import Config, sides
from ..data.batches import open_batches
from ..models.cond import Cond
from ..sampling.load import FrozenStack, build_network, open_stack
from .autoencoder import build_autoencoder
from .finetune import open_trainable
from .finetune_config import open_base, resolve_config
from .steps import count_parameters, split_batch, total_steps


def network(config: Config, num_classes: int) -> tuple[nn.Module, tuple, FrozenStack | None]:
    """Build what is trained, its inputs for one image, and the stack of a latent model.

    All is without memory, on the meta device, but for the pixel network, whose attention turns
    autocast off.
    """
    H, W = sides(config.image_size)
    if config.mode == "vae":
        with torch.device("meta"):
            model = build_autoencoder(config)
            factor = model.vae.factor
            latent = torch.zeros(1, config.latent_channels, H // factor, W // factor)
            return model, (torch.zeros(1, 3, H, W), latent), None
    if config.mode == "pixel":
        inputs = (torch.zeros(1, 3, H, W), torch.zeros(1))
        return build_network(config, num_classes), inputs, None
    stack = open_stack(config, torch.device("cpu"))
    prompts = stack.prompts
    with torch.device("meta"):
        model = build_network(config, num_classes, stack).to("meta")
        factor = stack.codec.factor
        cond = Cond()
        if prompts is not None:
            length = prompts.tokenizer.context_length
            width = () if prompts.joint else (prompts.encoder.config.hidden_size,)
            dtype = torch.long if prompts.joint else torch.float32
            cond = Cond(context=torch.zeros(1, length, *width, dtype=dtype))
        x = torch.zeros(1, stack.codec.channels, H // factor, W // factor)
        return model, (x, torch.zeros(1), cond), stack


class FusedAttention(torch.autograd.Function):
    """Keep what a fused attention keeps for backward, without computing anything."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out)
        return out


class CostCounter(TorchFunctionMode):
    """Count the forward FLOPs of what runs inside, the same on every machine.

    Which kernel torch chooses for attention depends on the processor and on torch's version, and
    so does whether FlopCounterMode knows it. Attention is therefore counted here, by its formula.
    """

    def __init__(self):
        self.attention = 0
        self.rest = FlopCounterMode(display=False)

    @property
    def flops(self) -> int:
        """FLOPs so far; one multiply-add is two."""
        return self.attention + self.rest.get_total_flops()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :]))[:3]
        self.attention += 2 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return FusedAttention.apply(q, k, v)


@contextmanager
def count_flops() -> Iterator[CostCounter]:
    """Give a CostCounter that counts while the block runs. Attention's output is zeros."""
    counter = CostCounter()
    with counter.rest, counter:
        yield counter


def forward_cost(config: Config, num_classes: int) -> tuple[int, int, int, int]:
    """Count (parameters, trained, forward FLOPs, bytes kept for backward) of one image in float32.

    One multiply-add is two FLOPs. An adapter's own FLOPs and activations are left out.
    """
    model, inputs, stack = network(config, num_classes)
    ours = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps their handles unique

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in ours:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with count_flops() as counter:
            model.train()(*inputs)
    if config.adapts:
        with torch.device("meta"):
            open_trainable(config, stack).freeze(model)
    return *count_parameters(model), counter.flops, sum(s.nbytes() for s in kept.values())


def describe(config: Config, given: set[str] | None = None) -> str:
    """Describe the run that a configuration would start, without starting it."""
    config = resolve_config(config, given, open_base(config) if config.adapts else None)
    data = open_batches(config)
    split = split_batch(config)
    total = total_steps(config, data.length)
    try:
        parameters, trained, flops, activations = forward_cost(config, len(data.classes))
    except ValueError as error:
        raise UserError(str(error)) from None
    # weights, EMA; gradients, two moments, averages; float32
    fixed = 4 * (2 * parameters + (3 + 2 * config.posthoc_ema) * trained)
    part = "" if trained == parameters else f" ({trained:,} trained)"
    epochs = f" ({total * config.batch_size / data.length:.1f} epochs)" if data.length else ""
    return "\n".join(
        [
            config.to_json(),
            f"data: {config.data}, {data.describe()}",
            f"length: {total:,} steps of {config.batch_size}{epochs}",
            f"network: {parameters:,} parameters{part}, {flops / 1e9:.3f} GFLOP forward per image",
            f"memory: about {fixed / 1e9:.2f} GB for weights, gradients, Adam and EMA, and "
            f"{split.micro * activations / 1e9:.2f} GB for the activations of a micro-batch of "
            f"{split.micro} in float32 (about half in bf16)",
        ]
    )
