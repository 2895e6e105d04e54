"""CLIP (arXiv:2103.00020): the text tower that Stable Diffusion 1.x listens to, and both towers.

    text:  ids -> token + position embeddings -> causal layers -> final_layer_norm
    image: patches + class token -> layers -> post_layernorm of the class token
    a layer: x + attention(norm x), then x + MLP(norm x)

Shapes: B batch, L tokens, D width, P width of the space that texts and images share.
"""

from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sd_blocks import attend, read_config, write_config

# of images in [0, 1], before they go into the vision tower
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

EOS, LEGACY_EOS = 49407, 2


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}
