"""Build networks: by name, without values on the meta device, or ready for inference.

NETWORKS    name -> (the dataclass of its sizes, its class)
build       every network that the package runs is made here
blank       sizes and names only, until a file's tensors take their places
*_config    how large the networks of latent mode are that are trained from scratch
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import cpu, cuda
from .clip import CLIPModel, CLIPTextModel
from .configs import CLIPConfig, CLIPTextConfig, UNetConfig, VAEConfig
from .layers import Conv3x3, WSConv3x3
from .sd_unet import SDUNet
from .tokenizer import Tokenizer
from .unet import UNet, join_films
from .vae import AutoencoderKL

MAX_INITS = 4000  # Stable Diffusion's U-Net takes 468
NETWORKS = {
    "unet": (UNetConfig, SDUNet),
    "vae": (VAEConfig, AutoencoderKL),
    "text_encoder": (CLIPTextConfig, CLIPTextModel),
    "clip": (CLIPConfig, CLIPModel),
}


def build(name: str, config) -> nn.Module:
    """Build a network of NETWORKS, with the faster forwards."""
    return cuda.install(cpu.install(NETWORKS[name][1](config)))


def build_pixel_unet(dim: int, dim_mults: tuple[int, ...], **options) -> UNet:
    """Build the pixel U-Net, channels_last, with the faster forwards."""
    network = cuda.install(cpu.install(UNet(dim, dim_mults, **options)))
    return network.to(memory_format=torch.channels_last)


# --- sizes of networks trained from scratch ------------------------------------------------------


def unet_config(
    dim: int,
    dim_mults: Sequence[int],
    layers_per_block: int,
    *,
    channels: int,
    sample_size: int | tuple[int, int],
    num_classes: int = 0,
    text: bool = False,
    text_dim: int,
) -> UNetConfig:
    """Choose the sizes of a U-Net on latents, with attention at all levels but the outermost.

    channels, sample_size: of the latents. text: the attention reads a text's tokens, text_dim wide.
    """
    dims = tuple(dim * m for m in dim_mults)
    kind = "CrossAttnDownBlock2D" if text else "AttnDownBlock2D"
    down = ("DownBlock2D", *[kind] * (len(dims) - 1))
    return UNetConfig(
        in_channels=channels,
        out_channels=channels,
        sample_size=sample_size,
        block_out_channels=dims,
        layers_per_block=layers_per_block,
        down_block_types=down,
        up_block_types=tuple(k.replace("Down", "Up") for k in reversed(down)),
        mid_block_type="UNetMidBlock2DCrossAttn" if text else "UNetMidBlock2D",
        cross_attention_dim=text_dim,
        norm_num_groups=math.gcd(32, dim),
        # misnamed: the number of heads in CrossAttn blocks, the channels of a head in Attn blocks
        attention_head_dim=tuple(heads(d) if text else d // heads(d) for d in dims),
        num_classes=num_classes,
    )


def heads(dim: int) -> int:
    """Choose the number of heads so that each has about 32 channels."""
    return next(n for n in range(max(1, dim // 32), 0, -1) if dim % n == 0)


def text_config(dim: int, layers: int, tokenizer: Tokenizer) -> CLIPTextConfig:
    """Choose the sizes of a text encoder that is trained with the U-Net."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=4 * dim,
        num_hidden_layers=layers,
        num_attention_heads=heads(dim),
        max_position_embeddings=tokenizer.context_length,
        eos_token_id=tokenizer.eos_id,
    )


def vae_config(
    dim: int, dim_mults: Sequence[int], latent_channels: int, sample_size: int | tuple[int, int]
) -> VAEConfig:
    """Choose the sizes of a VAE. Its groups are not narrow, which is slow on CPUs."""
    return VAEConfig(
        block_out_channels=tuple(dim * m for m in dim_mults),
        layers_per_block=1,
        norm_num_groups=math.gcd(32, dim, max(1, dim // 16)),
        latent_channels=latent_channels,
        sample_size=sample_size,
        scaling_factor=1.0,
    )


# --- without values, and for inference -----------------------------------------------------------


class NoInit(TorchFunctionMode):
    """Skip `nn.init`: to draw values that are none, torch would import its compiler.

    Raises ValueError for more than MAX_INITS tensors.
    """

    inits = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == nn.init.__name__:
            self.inits += 1
            if self.inits > MAX_INITS:  # raised nowhere else: a `no_grad` ends by such a call, too
                raise ValueError("a network of more layers than any has")
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def blank() -> Iterator[None]:
    """Put modules made within on the meta device, where only their number costs anything.

    Raises ValueError for more of them than any network has.
    """
    with torch.device("meta"), NoInit():
        yield


def state_of(network: nn.Module) -> tuple[list, list[Tensor]]:
    """List what `for_inference` copies of a network; two equal lists mean that nothing has changed.

    Where its tensors lie and how often torch has changed them in place, the numbers that its
    modules hold (whether they train, the weights of LoRAs), and its hooks. Also gives views of the
    tensors: while these live, no other tensor gets their addresses. What changes values without
    torch, a kernel of another library or a replayed CUDA graph, does not show, nor does `.data`.
    Tensors made in inference mode do not count their changes: they are taken to change always.
    """
    found = []
    views = []
    for module in network.modules():
        own = vars(module)
        found += [value for value in own.values() if isinstance(value, int | float)]
        found += [*own["_forward_hooks"], *own["_forward_pre_hooks"]]
        for tensor in chain(own["_parameters"].values(), own["_buffers"].values()):
            if tensor is not None:
                changes = object() if tensor.is_inference() else tensor._version
                found += [id(tensor), tensor.data_ptr(), changes]
                views.append(tensor.detach())
    return found, views


@torch.inference_mode(False)  # what it makes may be differentiated through later
@torch.no_grad()
def for_inference(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a network to the same function, which does once what the network does at every call.

    Standardised weights are computed, and cast to dtype, that of autocast, as the weights of all
    convolutions and linear layers are. On a GPU, the pixel U-Net computes all its FiLMs at once.
    What stays as it is is shared with the network.
    """
    network = copy.deepcopy(network, {id(p): p for p in network.parameters()})
    for parent in list(network.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, WSConv3x3):
                setattr(parent, name, folded(module))
    for module in network.modules():
        if dtype is not None and isinstance(module, nn.Conv2d | nn.Linear):
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(p.to(dtype), requires_grad=False))
    if isinstance(network, UNet) and next(network.parameters()).is_cuda:
        join_films(network)  # launches are the limit there
    return network


def folded(conv: WSConv3x3) -> Conv3x3:
    """Make the plain convolution with the weights that a weight-standardised one convolves with."""
    with torch.device("meta"):
        plain = Conv3x3(conv.in_channels, conv.out_channels, conv.bias is not None)
    plain.weight = nn.Parameter(conv.standardised(), requires_grad=False)
    plain.bias = conv.bias
    return cpu.install(plain)
