"""How large the networks of latent mode are that are trained from scratch."""

import math

from ..config import Config
from ..models.configs import CLIPTextConfig, UNetConfig, VAEConfig
from ..models.tokenizer import Tokenizer


def unet_config(config: Config, channels: int, factor: int, classes: int) -> UNetConfig:
    """Of a network trained from scratch; attention at all levels but the outermost."""
    dims = tuple(config.unet_dim * m for m in config.dim_mults)
    kind = "CrossAttnDownBlock2D" if config.condition == "text" else "AttnDownBlock2D"
    down = ("DownBlock2D", *[kind] * (len(dims) - 1))
    text = config.condition == "text"
    return UNetConfig(
        in_channels=channels,
        out_channels=channels,
        sample_size=config.image_size // factor,
        block_out_channels=dims,
        layers_per_block=config.layers_per_block,
        down_block_types=down,
        up_block_types=tuple(k.replace("Down", "Up") for k in reversed(down)),
        mid_block_type="UNetMidBlock2DCrossAttn" if text else "UNetMidBlock2D",
        cross_attention_dim=config.text_dim,
        norm_num_groups=math.gcd(32, config.unet_dim),
        # misnamed: the number of heads in CrossAttn blocks, the channels of a head in Attn blocks
        attention_head_dim=tuple(heads(d) if text else d // heads(d) for d in dims),
        num_classes=classes,
    )


def heads(dim: int) -> int:
    """Of about 32 channels each."""
    return next(n for n in range(max(1, dim // 32), 0, -1) if dim % n == 0)


def text_config(config: Config, tokenizer: Tokenizer) -> CLIPTextConfig:
    """Of a text encoder trained along."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.text_dim,
        intermediate_size=4 * config.text_dim,
        num_hidden_layers=config.text_layers,
        num_attention_heads=heads(config.text_dim),
        max_position_embeddings=config.text_length,
        eos_token_id=tokenizer.eos_id,
    )


def vae_config(config: Config) -> VAEConfig:
    dims = tuple(config.unet_dim * m for m in config.dim_mults)
    # narrow groups are slow on CPUs
    groups = math.gcd(32, config.unet_dim, max(1, config.unet_dim // 16))
    return VAEConfig(
        block_out_channels=dims,
        layers_per_block=1,
        norm_num_groups=groups,
        latent_channels=config.latent_channels,
        sample_size=config.image_size,
        scaling_factor=1.0,
    )
