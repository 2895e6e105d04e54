"""The config.json files of Stable Diffusion's networks, as dataclasses.

Fields are named as in the files; their defaults are Stable Diffusion 1.5's. `from_dict` reads what
a file holds and raises ValueError for networks of other families. `to_dict` writes what diffusers
or transformers read.
"""

from dataclasses import asdict, dataclass, field, fields, replace

# Whose networks have a field that these have not.
FAMILIES = {
    "addition_embed_type": " (others: SDXL)",
    "transformer_layers_per_block": " (others: SDXL)",
    "time_cond_proj_dim": " (others: latent consistency models)",
}


def read_config(cls, config: dict, fixed: dict, missing: dict, ignored: tuple[str, ...] | None):
    """A dataclass from the contents of a config.json.

    fixed: fields that the network supports with one value only. missing: the values of fields that
    the file leaves out. ignored: fields that do not change the network; None: all unknown ones.
    Raises ValueError for whatever else is in the file and is neither null nor false.
    """
    known = [f.name for f in fields(cls)]
    for key, value in config.items():
        note = ignored is None or key in ignored or key.startswith("_")
        if key in fixed and value != fixed[key]:
            found = f"{key} is {value!r}; supported: {fixed[key]!r}"
        elif key not in known and key not in fixed and value and not note:
            found = f"{key} is {value!r}; supported: {key} left out, null or false"
        else:
            continue
        raise ValueError(f"{cls.__name__}: {found}{FAMILIES.get(key, '')}")
    values = {k: v for k, v in {**missing, **config}.items() if k in known}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def write_config(config, fixed: dict, **more) -> dict:
    """What `read_config` reads: JSON's own types only."""
    values = {**fixed, **asdict(config), **more}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def check(config, name: str, good: bool, supported: str) -> None:
    if not good:
        found = f"{name} is {getattr(config, name)!r}; supported: {supported}"
        raise ValueError(f"{type(config).__name__}: {found}")


def whole(*numbers) -> bool:
    return all(isinstance(n, int) and n > 0 for n in numbers)


# --- the U-Net -----------------------------------------------------------------------------------

DOWN = ("CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D")
MID = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")
UP = ("CrossAttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")

UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}
# SDPA's softmax is in float32 whatever upcast_attention says; the others are of addition_embed_type
UNET_IGNORED = ("upcast_attention", "addition_embed_type_num_heads", "addition_time_embed_dim")


@dataclass(frozen=True)
class UNetConfig:
    """unet/config.json, diffusers' UNet2DConditionModel; Stable Diffusion 2's is read too.

    in_channels: 4; 9 for inpainting (latent, mask, latent of the masked image).
    *_block_types: what each level attends to: CrossAttn the positions and the context, Attn the
        positions only, without a prefix nothing. A network without CrossAttn takes no context.
    attention_head_dim: misnamed in the files: the number of heads of CrossAttn blocks, but the
        channels of a head in Attn blocks. One number, or one per level.
    num_classes: 0 for none; else labels are 0 ... num_classes, of which the last means no label.
        In the file, num_class_embeds is one more.
    sample_size: latent H and W that it was trained for; the network takes any.
    """

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int | tuple[int, int] | None = 64
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...] = (*3 * (DOWN[0],), DOWN[2])
    mid_block_type: str = MID[0]
    up_block_types: tuple[str, ...] = (UP[2], *3 * (UP[0],))
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    use_linear_projection: bool = False
    num_classes: int = 0

    def __post_init__(self):
        levels = len(self.block_out_channels)
        for name, known in (("down_block_types", DOWN), ("up_block_types", UP)):
            types = getattr(self, name)
            good = len(types) == levels and set(types) <= set(known)
            check(self, name, good, f"{levels} of {', '.join(known)}")
        check(self, "mid_block_type", self.mid_block_type in MID, " or ".join(MID))
        for name in ("layers_per_block", "cross_attention_dim", "norm_num_groups"):
            check(self, name, whole(getattr(self, name)), "one whole number above 0")
        heads = self.heads
        good = len(heads) == levels and whole(*heads)
        good = good and not any(c % n for c, n in zip(self.block_out_channels, heads))
        check(self, "attention_head_dim", good, "a divisor of block_out_channels, or one for each")

    @property
    def heads(self) -> tuple[int, ...]:
        """attention_head_dim of each level."""
        n = self.attention_head_dim
        return n if isinstance(n, tuple) else (n,) * len(self.block_out_channels)

    @classmethod
    def from_dict(cls, config: dict) -> "UNetConfig":
        config = dict(config)
        classes = config.pop("num_class_embeds", None)
        config["num_classes"] = 0 if classes is None else classes - 1
        missing = {"cross_attention_dim": 1280, "sample_size": None}  # diffusers' defaults
        return read_config(cls, config, UNET, missing, UNET_IGNORED)

    def to_dict(self) -> dict:
        values = write_config(self, UNET)
        classes = values.pop("num_classes")
        return {**values, "num_class_embeds": classes + 1 if classes else None}


# --- the VAE -------------------------------------------------------------------------------------

VAE = {"_class_name": "AutoencoderKL", "act_fn": "silu", "mid_block_add_attention": True}


@dataclass(frozen=True)
class VAEConfig:
    """vae/config.json, diffusers' AutoencoderKL.

    scaling_factor, shift_factor: see AutoencoderKL.scale.
    use_quant_conv, use_post_quant_conv: Stable Diffusion 3's VAE has neither of these convolutions.
    sample_size: image H and W that it was trained for; the network takes any.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 512
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    def blocks(self) -> dict[str, list[str]]:
        """The fields of the file that say only how many levels there are."""
        levels = len(self.block_out_channels)
        return {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }

    @classmethod
    def from_dict(cls, config: dict) -> "VAEConfig":
        missing = {"block_out_channels": [64], "layers_per_block": 1, "sample_size": 32}
        made = cls(block_out_channels=tuple(config.get("block_out_channels", [64])))
        fixed = {**VAE, **made.blocks()}
        return read_config(cls, config, fixed, missing, ("force_upcast",))

    def to_dict(self) -> dict:
        return write_config(self, VAE, **self.blocks())


# --- CLIP ----------------------------------------------------------------------------------------

EOS = 49407  # the id that ends a prompt
LEGACY_EOS = 2  # what files from before 2023 say instead

TEXT = {"model_type": "clip_text_model", "attention_dropout": 0.0}
VISION = {"model_type": "clip_vision_model", "attention_dropout": 0.0}


@dataclass(frozen=True)
class TowerConfig:
    """What CLIP's two towers have in common."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        check(self, "hidden_act", self.hidden_act in ("quick_gelu", "gelu"), "quick_gelu or gelu")
        good = self.hidden_size % self.num_attention_heads == 0
        check(self, "num_attention_heads", good, f"a divisor of hidden_size {self.hidden_size}")


@dataclass(frozen=True)
class CLIPTextConfig(TowerConfig):
    """text_encoder/config.json, transformers' CLIPTextModel; Stable Diffusion 2's is read too."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = EOS

    @classmethod
    def from_dict(cls, config: dict) -> "CLIPTextConfig":
        projected = [a for a in config.get("architectures") or () if a.endswith("WithProjection")]
        if projected:
            raise ValueError(
                f"CLIPTextConfig: architectures is {projected}; supported: "
                "['CLIPTextModel'] (others: SDXL)"
            )
        missing = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
        made = read_config(cls, config, TEXT, missing, None)  # missing: transformers' defaults
        legacy = made.eos_token_id == LEGACY_EOS
        return replace(made, eos_token_id=min(EOS, made.vocab_size - 1)) if legacy else made

    def to_dict(self) -> dict:
        return write_config(self, TEXT, architectures=["CLIPTextModel"])


@dataclass(frozen=True)
class CLIPVisionConfig(TowerConfig):
    """The vision tower of ViT-L/14. image_size, patch_size: sides in pixels."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14

    @classmethod
    def from_dict(cls, config: dict) -> "CLIPVisionConfig":
        missing = {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "patch_size": 32,
        }
        return read_config(cls, config, VISION, missing, None)  # missing: transformers' defaults


@dataclass(frozen=True)
class CLIPConfig:
    """config.json of transformers' CLIPModel: both towers, and the width of what they share."""

    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection_dim: int = 768

    @classmethod
    def from_dict(cls, config: dict) -> "CLIPConfig":
        kind = config.get("model_type", "clip")
        if kind != "clip":
            raise ValueError(f"CLIPConfig: model_type is {kind!r}; supported: 'clip'")
        # old files hold each tower twice, and there *_config_dict counts
        text, vision = (
            config.get(f"{name}_config_dict") or config.get(f"{name}_config") or {}
            for name in ("text", "vision")
        )
        towers = CLIPTextConfig.from_dict(text), CLIPVisionConfig.from_dict(vision)
        return cls(*towers, config.get("projection_dim", 512))

    def to_dict(self) -> dict:
        return {
            "model_type": "clip",
            "architectures": ["CLIPModel"],
            "projection_dim": self.projection_dim,
            "text_config": self.text.to_dict(),
            "vision_config": write_config(self.vision, VISION),
        }
