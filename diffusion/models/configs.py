"""The sizes of Stable Diffusion's networks, as their config.json files hold them.

Fields are named as in the files; their defaults are Stable Diffusion 1.5's. `from_dict` reads what
a file holds and raises ValueError for what the networks here do not support. `to_dict` returns what
diffusers or transformers read.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from types import UnionType
from typing import NoReturn, get_args, get_origin

from .. import shown

MAX_SIZE = 1 << 24  # no side, width or vocabulary of a network is larger
MAX_LAYERS = 1000
MAX_LEVELS = 16
MAX_SIDE = 2048  # pixels of the images that a file may say itself to be made for
FROM_ZERO = ("num_classes", "eos_token_id")  # the other whole numbers begin at 1


class Sizes:
    """Read, check and write the fields of a dataclass: each of its type, within the bounds above.

    FIXED: keys that are supported with one value only. MISSING: the values of fields that a file
    leaves out. IGNORED: keys that do not change the network; "*" is any.
    """

    FIXED = {}
    MISSING = {}
    IGNORED = ()

    def __post_init__(self):
        for f in fields(self):
            high = MAX_LAYERS if "layers" in f.name else MAX_SIZE
            whole = range(0 if f.name in FROM_ZERO else 1, high + 1)
            kind = f.type.__name__ if f.type in (int, float, str, bool) else str(f.type)
            limits = f" of {whole.start} to {high:,}" if "int" in kind else ""
            self.require(f.name, fits(getattr(self, f.name), f.type, whole), kind + limits)

    @classmethod
    def from_dict(cls, config: dict):
        """Read the contents of a config.json.

        Raises ValueError for values that are not supported, and for a key that is not known unless
        its value is null, zero, empty or false.
        """
        cls.check_fixed(config, cls.FIXED)
        names = [f.name for f in fields(cls)]
        for key, value in config.items():
            harmless = not value or str(key).startswith("_")
            harmless = harmless or key in cls.IGNORED or "*" in cls.IGNORED
            if key not in cls.FIXED and key not in names and not harmless:
                name = shown(key).strip("'")
                raise ValueError(f"{cls.__name__}: unknown key {name}, which is {shown(value)}")
        values = {k: v for k, v in {**cls.MISSING, **config}.items() if k in names}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def to_dict(self) -> dict:
        """Return what `from_dict` reads, in JSON's own types."""
        values = self.FIXED | asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def check_fixed(cls, config: dict, fixed: dict) -> None:
        for key, value in fixed.items():
            if key in config and config[key] != value:
                cls.refuse(key, config[key], repr(value))

    @classmethod
    def refuse(cls, name: str, value, supported: str) -> NoReturn:
        """Raise ValueError for a value that is not supported."""
        raise ValueError(f"{cls.__name__}: {name} is {shown(value)}; supported: {supported}")

    def require(self, name: str, good: bool, supported: str) -> None:
        """Raise ValueError for a field whose value is not supported."""
        if not good:
            self.refuse(name, getattr(self, name), supported)


def fits(value, kind, whole: range) -> bool:
    """Tell whether a value is of the type that an annotation names; whole: what integers may be."""
    if isinstance(kind, UnionType):
        return any(fits(value, one, whole) for one in get_args(kind))
    if get_origin(kind) is tuple:
        first, rest = get_args(kind)
        lengths = range(1, MAX_LEVELS + 1) if rest is ... else (2,)
        good = isinstance(value, tuple) and len(value) in lengths
        return good and all(fits(one, first, whole) for one in value)
    if kind is int:
        return type(value) is int and value in whole
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e9
    return isinstance(value, kind)


# --- the U-Net -----------------------------------------------------------------------------------

DOWN = ("CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D")
MID = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")
UP = ("CrossAttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")


@dataclass(frozen=True)
class UNetConfig(Sizes):
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

    FIXED = {
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
    MISSING = {"cross_attention_dim": 1280, "sample_size": None}  # diffusers' defaults
    # SDPA's softmax is in float32 whatever upcast_attention says; the others are of
    # addition_embed_type
    IGNORED = ("upcast_attention", "addition_embed_type_num_heads", "addition_time_embed_dim")

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
        super().__post_init__()
        dims = self.block_out_channels
        for name, known in (("down_block_types", DOWN), ("up_block_types", UP)):
            kinds = getattr(self, name)
            good = len(kinds) == len(dims) and set(kinds) <= set(known)
            self.require(name, good, f"{len(dims)} of {', '.join(known)}")
        self.require("mid_block_type", self.mid_block_type in MID, " or ".join(MID))
        good = len(self.heads) == len(dims) and not any(d % n for d, n in zip(dims, self.heads))
        self.require("attention_head_dim", good, f"a divisor of {dims}, or one for each")
        good = 0 <= self.freq_shift < dims[0] // 2
        self.require("freq_shift", good, f"from 0 to below {dims[0] // 2}")

    @property
    def heads(self) -> tuple[int, ...]:
        """List attention_head_dim of each level."""
        n = self.attention_head_dim
        return n if isinstance(n, tuple) else (n,) * len(self.block_out_channels)

    @property
    def side(self) -> int:
        """Give the longer side of sample_size; 64 where the file has none."""
        size = self.sample_size or 64
        return max(size) if isinstance(size, tuple) else size

    @classmethod
    def from_dict(cls, config: dict) -> "UNetConfig":
        classes = config.get("num_class_embeds")
        if classes is not None and not fits(classes, int, range(1, MAX_SIZE)):
            cls.refuse("num_class_embeds", classes, "1 or more")
        own = {"num_class_embeds": None, "num_classes": classes - 1 if classes else 0}
        return super().from_dict(config | own)

    def to_dict(self) -> dict:
        values = super().to_dict()
        classes = values.pop("num_classes")
        return {**values, "num_class_embeds": classes + 1 if classes else None}


# --- the VAE -------------------------------------------------------------------------------------


def vae_blocks(dims) -> dict[str, list[str]]:
    """Write the keys of the file that say only how many levels there are."""
    return {
        "down_block_types": ["DownEncoderBlock2D"] * len(dims),
        "up_block_types": ["UpDecoderBlock2D"] * len(dims),
    }


@dataclass(frozen=True)
class VAEConfig(Sizes):
    """vae/config.json, diffusers' AutoencoderKL.

    scaling_factor, shift_factor: see AutoencoderKL.scale.
    use_quant_conv, use_post_quant_conv: Stable Diffusion 3's VAE has neither of these convolutions.
    sample_size: image H and W that it was trained for; the network takes any.
    """

    FIXED = {"_class_name": "AutoencoderKL", "act_fn": "silu", "mid_block_add_attention": True}
    MISSING = {"block_out_channels": (64,), "layers_per_block": 1, "sample_size": 32}  # diffusers'
    IGNORED = ("force_upcast", "down_block_types", "up_block_types")

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] | None = 512
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @classmethod
    def from_dict(cls, config: dict) -> "VAEConfig":
        made = super().from_dict(config)
        cls.check_fixed(config, vae_blocks(made.block_out_channels))
        return made

    def to_dict(self) -> dict:
        return super().to_dict() | vae_blocks(self.block_out_channels)


# --- CLIP ----------------------------------------------------------------------------------------

EOS = 49407  # the id that ends a prompt
LEGACY_EOS = 2  # what files from before 2023 say instead


@dataclass(frozen=True)
class TowerConfig(Sizes):
    """Hold the sizes that CLIP's two towers have in common. MISSING: transformers' defaults."""

    IGNORED = ("*",)

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        known = ("quick_gelu", "gelu")
        self.require("hidden_act", self.hidden_act in known, " or ".join(known))
        good = self.hidden_size % self.num_attention_heads == 0
        self.require("num_attention_heads", good, f"a divisor of {self.hidden_size}")


@dataclass(frozen=True)
class CLIPTextConfig(TowerConfig):
    """text_encoder/config.json, transformers' CLIPTextModel; Stable Diffusion 2's is read too."""

    FIXED = {"model_type": "clip_text_model", "attention_dropout": 0.0}
    MISSING = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int | None = EOS

    @classmethod
    def from_dict(cls, config: dict) -> "CLIPTextConfig":
        kinds = config.get("architectures")
        if isinstance(kinds, list) and "CLIPTextModelWithProjection" in kinds:
            cls.refuse("architectures", kinds, "CLIPTextModel")
        made = super().from_dict(config)
        legacy = made.eos_token_id in (LEGACY_EOS, None)
        return replace(made, eos_token_id=min(EOS, made.vocab_size - 1)) if legacy else made

    def to_dict(self) -> dict:
        return super().to_dict() | {"architectures": ["CLIPTextModel"]}


@dataclass(frozen=True)
class CLIPVisionConfig(TowerConfig):
    """Hold the sizes of the vision tower of ViT-L/14. image_size, patch_size: sides in pixels."""

    FIXED = {"model_type": "clip_vision_model", "attention_dropout": 0.0}
    MISSING = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 32,
    }

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14


@dataclass(frozen=True)
class CLIPConfig(Sizes):
    """config.json of transformers' CLIPModel: both towers, and the width of what they share."""

    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection_dim: int = 768

    @classmethod
    def from_dict(cls, config: dict) -> "CLIPConfig":
        cls.check_fixed(config, {"model_type": "clip"})
        # old files hold each tower twice, and there *_config_dict counts
        text, vision = (
            config.get(f"{name}_config_dict") or config.get(f"{name}_config") or {}
            for name in ("text", "vision")
        )
        for name, values in (("text_config", text), ("vision_config", vision)):
            if not isinstance(values, dict):
                cls.refuse(name, values, "an object")
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
