"""What `train.py --dry_run` prints: configuration, size, cost and data of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from .. import UserError
from ..config import Config
from ..data.batches import open_batches
from ..models import lora
from ..models.textual_inversion import extend
from ..sampling.adapt import parts_of
from ..sampling.conditioning import TextConditioned
from ..sampling.load import open_parts
from ..sampling.pipeline import build_model
from ..sampling.sizes import vae_config
from .autoencoder import KLAutoencoder
from .finetune_config import based_on
from .steps import rank_share, total_steps


def network(config: Config, classes: int) -> tuple[nn.Module, tuple]:
    """What is trained, and what it takes of one image; without memory, on the meta device, but for
    the pixel network, whose attention turns autocast off."""
    side = config.image_size
    told = None
    if config.mode == "vae":
        made = vae_config(config)
        with torch.device("meta"):
            model = KLAutoencoder(made)
            latent = (1, made.latent_channels, side // model.vae.factor, side // model.vae.factor)
            return model, (torch.zeros(1, 3, side, side), torch.zeros(latent))
    if config.mode == "pixel":
        model = build_model(config, classes)
        x = torch.zeros(1, 3, side, side)
    else:
        parts = open_parts(config, torch.device("cpu"))
        with torch.device("meta"):
            model = parts.build(classes).to("meta")
            side //= parts.vae.factor
            x = torch.zeros(1, parts.vae.config.latent_channels, side, side)
            if isinstance(model, TextConditioned):
                told = torch.zeros(1, parts.text.tokenizer.context_length, dtype=torch.long)
            elif config.condition == "text":
                width = parts.text.model.config.hidden_size
                told = torch.zeros(1, parts.text.tokenizer.context_length, width)
    t = torch.zeros(1, device=x.device)
    return model, (x, t) if told is None else (x, t, told)


def adapted(model: nn.Module, config: Config) -> None:
    """As training/adapters.py does: what is trained, and branches where there are some."""
    parts = parts_of(model)
    if not config.train_text_encoder:
        parts = {"unet": parts["unet"]}
    model.requires_grad_(False)
    for part in parts.values():
        if config.adapter == "none":
            part.requires_grad_(True)
        elif config.adapter == "lora":
            with torch.device("meta"):
                lora.inject(part, lora.find(part, config.targets), config.rank)
    if config.adapter == "textual_inversion":
        text = model.text
        extend(text, torch.zeros(config.vectors, text.config.hidden_size), text.config.vocab_size)


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
    """(parameters, trained ones, forward FLOPs, bytes kept for backward) of one image in float32.

    One multiply-add is two FLOPs. An adapter's own FLOPs and activations are left out.
    """
    model, inputs = network(config, num_classes)
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
        adapted(model, config)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return parameters, trained, counter.flops, sum(s.nbytes() for s in kept.values())


def describe(config: Config, given: set[str] | None = None) -> str:
    config = based_on(config, given)
    data = open_batches(config)
    share = rank_share(config)
    total = total_steps(config, data.length)
    try:
        parameters, trained, flops, activations = forward_cost(config, len(data.classes))
    except ValueError as error:
        raise UserError(str(error)) from None
    fixed = 4 * (2 * parameters + 3 * trained)  # weights, EMA; gradients, two moments; float32
    part = "" if trained == parameters else f" ({trained:,} trained)"
    epochs = f" ({total * config.batch_size / data.length:.1f} epochs)" if data.length else ""
    return "\n".join(
        [
            config.to_json(),
            f"data: {config.data}, {data.describe()}",
            f"length: {total:,} steps of {config.batch_size}{epochs}",
            f"network: {parameters:,} parameters{part}, {flops / 1e9:.3f} GFLOP forward per image",
            f"memory: about {fixed / 1e9:.2f} GB for weights, gradients, Adam and EMA, and "
            f"{share.micro * activations / 1e9:.2f} GB for the activations of a micro-batch of "
            f"{share.micro} in float32 (about half in bf16)",
        ]
    )
