"""The sizes of Stable Diffusion's networks, as their config.json files hold them.

Fields are named as in the files; their defaults are Stable Diffusion 1.5's. `from_dict` reads what
a file holds and raises ValueError for what the networks here do not support. `to_dict` returns what
diffusers or transformers read.
"""

from dataclasses import asdict, dataclass, field, fields, replace


def read_config(cls, config: dict, fixed: dict, missing: dict, ignored: tuple[str, ...] = ()):
    """Make a dataclass from the contents of a config.json.

    fixed: keys that are supported with one value only. missing: the values of fields that the file
    leaves out. ignored: keys that do not change the network; "*" is any.
    Raises ValueError for another key, unless its value is null, zero, empty or false.
    """
    names = [f.name for f in fields(cls)]
    for key, value in config.items():
        harmless = not value or key.startswith("_") or key in ignored or "*" in ignored
        if key in fixed and value != fixed[key]:
            problem = f"{key} is {value!r}; supported: {fixed[key]!r}"
        elif key not in fixed and key not in names and not harmless:
            problem = f"unknown key {key}, which is {value!r}"
        else:
            continue
        raise ValueError(f"{cls.__name__}: {problem}")
    values = {k: v for k, v in {**missing, **config}.items() if k in names}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def write_config(config, fixed: dict, **more) -> dict:
    """Return what `read_config` reads, in JSON's own types."""
    values = {**fixed, **asdict(config), **more}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def require(config, name: str, good: bool, supported: str) -> None:
    """Raise ValueError for a field whose value is not supported."""
    if not good:
        found = f"{name} is {getattr(config, name)!r}; supported: {supported}"
        raise ValueError(f"{type(config).__name__}: {found}")


def positive(*numbers) -> bool:
    """Tell whether all are integers above 0."""
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
UNET_MISSING = {"cross_attention_dim": 1280, "sample_size": None}  # diffusers' defaults


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
        dims = self.block_out_channels
        for name, known in (("down_block_types", DOWN), ("up_block_types", UP)):
            kinds = getattr(self, name)
            good = len(kinds) == len(dims) and set(kinds) <= set(known)
            require(self, name, good, f"{len(dims)} of {', '.join(known)}")
        require(self, "mid_block_type", self.mid_block_type in MID, " or ".join(MID))
        for name in ("layers_per_block", "cross_attention_dim", "norm_num_groups"):
            require(self, name, positive(getattr(self, name)), "one integer above 0")
        good = len(self.heads) == len(dims) and positive(*self.heads)
        good = good and not any(d % n for d, n in zip(dims, self.heads))
        require(self, "attention_head_dim", good, f"a divisor of {dims}, or one for each")

    @property
    def heads(self) -> tuple[int, ...]:
        """List attention_head_dim of each level."""
        n = self.attention_head_dim
        return n if isinstance(n, tuple) else (n,) * len(self.block_out_channels)

    @classmethod
    def from_dict(cls, config: dict) -> "UNetConfig":
        config = dict(config)
        classes = config.pop("num_class_embeds", None)
        config["num_classes"] = 0 if classes is None else classes - 1
        return read_config(cls, config, UNET, UNET_MISSING, UNET_IGNORED)

    def to_dict(self) -> dict:
        values = write_config(self, UNET)
        classes = values.pop("num_classes")
        return {**values, "num_class_embeds": classes + 1 if classes else None}


# --- the VAE -------------------------------------------------------------------------------------

VAE = {"_class_name": "AutoencoderKL", "act_fn": "silu", "mid_block_add_attention": True}
VAE_MISSING = {"block_out_channels": (64,), "layers_per_block": 1, "sample_size": 32}  # diffusers'


def vae_blocks(dims) -> dict[str, list[str]]:
    """Write the keys of the file that say only how many levels there are."""
    return {
        "down_block_types": ["DownEncoderBlock2D"] * len(dims),
        "up_block_types": ["UpDecoderBlock2D"] * len(dims),
    }


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

    @classmethod
    def from_dict(cls, config: dict) -> "VAEConfig":
        dims = {**VAE_MISSING, **config}["block_out_channels"]
        return read_config(cls, config, VAE | vae_blocks(dims), VAE_MISSING, ("force_upcast",))

    def to_dict(self) -> dict:
        return write_config(self, VAE, **vae_blocks(self.block_out_channels))


# --- CLIP ----------------------------------------------------------------------------------------

EOS = 49407  # the id that ends a prompt
LEGACY_EOS = 2  # what files from before 2023 say instead

TEXT = {"model_type": "clip_text_model", "attention_dropout": 0.0}
TEXT_MISSING = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
VISION = {"model_type": "clip_vision_model", "attention_dropout": 0.0}
VISION_MISSING = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 32,
}  # both: transformers' defaults


@dataclass(frozen=True)
class TowerConfig:
    """Hold the sizes that CLIP's two towers have in common."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        known = ("quick_gelu", "gelu")
        require(self, "hidden_act", self.hidden_act in known, " or ".join(known))
        good = self.hidden_size % self.num_attention_heads == 0
        require(self, "num_attention_heads", good, f"a divisor of {self.hidden_size}")


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
        kinds = config.get("architectures") or ()
        if any(kind.endswith("WithProjection") for kind in kinds):
            raise ValueError(f"CLIPTextConfig: architectures is {kinds}; supported: CLIPTextModel")
        made = read_config(cls, config, TEXT, TEXT_MISSING, ("*",))
        legacy = made.eos_token_id == LEGACY_EOS
        return replace(made, eos_token_id=min(EOS, made.vocab_size - 1)) if legacy else made

    def to_dict(self) -> dict:
        return write_config(self, TEXT, architectures=["CLIPTextModel"])


@dataclass(frozen=True)
class CLIPVisionConfig(TowerConfig):
    """Hold the sizes of the vision tower of ViT-L/14. image_size, patch_size: sides in pixels."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14

    @classmethod
    def from_dict(cls, config: dict) -> "CLIPVisionConfig":
        return read_config(cls, config, VISION, VISION_MISSING, ("*",))

    def to_dict(self) -> dict:
        return write_config(self, VISION)


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
            "vision_config": self.vision.to_dict(),
        }
