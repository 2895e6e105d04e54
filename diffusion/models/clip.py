"""CLIP (arXiv:2103.00020): the text tower of Stable Diffusion 1.x, and both towers.

    text:  token + position embeddings -> causal layers -> final_layer_norm
    image: class token and patches + position embeddings -> norm -> layers -> norm of class token
    layer: x + attention(norm x), then x + MLP(norm x)

Shapes: B batch, L tokens, D width, P width of the space that texts and images share.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configs import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, TowerConfig
from .layers import MultiHead, to_tokens

# the vision tower takes (images in [0, 1] - mean) / std
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


# --- layers --------------------------------------------------------------------------------------


class CLIPAttention(MultiHead):
    """Multi-head self-attention of (B, L, D)."""

    def __init__(self, dim: int, heads: int, causal: bool):
        super().__init__(heads, causal)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.attend(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class CLIPMLP(nn.Module):
    """Run a two-layer MLP on (B, L, D)."""

    def __init__(self, dim: int, inner: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(dim, inner)
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """Self-attention and an MLP, each beside a skip, with a norm before."""

    def __init__(self, c: TowerConfig, causal: bool):
        super().__init__()
        D = c.hidden_size
        self.layer_norm1 = nn.LayerNorm(D, eps=c.layer_norm_eps)
        self.self_attn = CLIPAttention(D, c.num_attention_heads, causal)
        self.layer_norm2 = nn.LayerNorm(D, eps=c.layer_norm_eps)
        self.mlp = CLIPMLP(D, c.intermediate_size, c.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """Run a stack of layers, of which the last `skip` can be left out: (B, L, D) -> (B, L, D)."""

    def __init__(self, c: TowerConfig, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(c, causal) for _ in range(c.num_hidden_layers))

    def forward(self, x: Tensor, skip: int = 0) -> Tensor:
        for layer in self.layers[: len(self.layers) - skip]:
            x = layer(x)
        return x


# --- towers --------------------------------------------------------------------------------------


class TextEmbeddings(nn.Module):
    """Token and position embeddings: ids (B, L) -> (B, L, D).

    New tokens need a longer token_embedding, nothing else.
    """

    def __init__(self, c: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embedding = nn.Embedding(c.max_position_embeddings, c.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTransformer(nn.Module):
    """Run the text tower without its projection."""

    def __init__(self, c: CLIPTextConfig):
        super().__init__()
        self.eos = c.eos_token_id
        self.embeddings = TextEmbeddings(c)
        self.encoder = CLIPEncoder(c, causal=True)
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, ids: Tensor, skip: int = 1) -> Tensor:
        """Encode ids (B, L) to (B, L, D); see CLIPTextModel."""
        layers = len(self.encoder.layers)
        if not 1 <= skip <= layers:
            raise ValueError(f"skip is {skip}; use 1 (the last layer) to {layers}")
        return self.final_layer_norm(self.encoder(self.embeddings(ids), skip - 1))

    def pool(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Take from hidden (B, L, D) the vector at each row's first EOS: (B, D).

        OpenAI's code looks for the highest id, which is not EOS any more once tokens are added.
        """
        first = (ids == self.eos).int().argmax(1)
        return hidden[torch.arange(len(ids), device=ids.device), first]


class VisionEmbeddings(nn.Module):
    """Put a class token before embedded patches: images (B, 3, H, H) -> (B, 1 + N, D)."""

    def __init__(self, c: CLIPVisionConfig):
        super().__init__()
        D = c.hidden_size
        P = c.patch_size
        self.class_embedding = nn.Parameter(torch.randn(D) * D**-0.5)
        self.patch_embedding = nn.Conv2d(c.num_channels, D, P, stride=P, bias=False)
        self.position_embedding = nn.Embedding(1 + (c.image_size // P) ** 2, D)

    def forward(self, x: Tensor) -> Tensor:
        patches = to_tokens(self.patch_embedding(x))
        token = self.class_embedding.to(patches.dtype).expand(len(x), 1, -1)
        return torch.cat([token, patches], 1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """Run the image tower, unprojected: images (B, 3, H, H) -> the class token's (B, D)."""

    def __init__(self, c: CLIPVisionConfig):
        super().__init__()
        D = c.hidden_size
        eps = c.layer_norm_eps
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(D, eps=eps)  # spelt so in the files
        self.encoder = CLIPEncoder(c, causal=False)
        self.post_layernorm = nn.LayerNorm(D, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.pre_layrnorm(self.embeddings(x)))
        return self.post_layernorm(x[:, 0])


# --- models --------------------------------------------------------------------------------------


class CLIPTextModel(nn.Module):
    """Encode texts as Stable Diffusion does: ids (B, L) -> (B, L, D), after final_layer_norm.

    skip: A1111's and kohya's clip skip: 1 is the last layer's output, 2 the one before's; the norm
        is applied to either. (diffusers' clip_skip is one less.)
    Raises ValueError for layers that are not there.
    """

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def forward(self, ids: Tensor, skip: int = 1) -> Tensor:
        return self.text_model(ids, skip)


def encode_chunks(
    model: CLIPTextModel, ids: Tensor, skip: int = 1, weights: Tensor | None = None
) -> Tensor:
    """Encode long prompts: ids (B, n, L), each chunk BOS ... EOS -> (B, n (L - 2) + 2, D).

    Each chunk is read alone; the first one's BOS and the last one's end stay (kohya's SD 1.x way).
    weights (B, n, L): A1111's way, (B, n L, D): z = w h, then z mean(h) / mean(z), the means over
    a chunk's L x D numbers.
    """
    B, n, L = ids.shape
    h = model(ids.flatten(0, 1), skip)
    if weights is not None:
        z = h * weights.to(h.device).view(B * n, L, 1)
        before, after = (x.float().mean((1, 2), keepdim=True) for x in (h, z))
        return (z * (before / after)).to(h.dtype).view(B, n * L, -1)
    h = h.view(B, n, L, -1)
    return torch.cat([h[:, 0, :1], h[:, :, 1:-1].flatten(1, 2), h[:, -1, -1:]], 1)


class CLIPModel(nn.Module):
    """Both towers; the cosine of an image's and a text's features is how well they go together."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        P = config.projection_dim
        self.text_model = TextTransformer(config.text)
        self.vision_model = VisionTransformer(config.vision)
        self.text_projection = nn.Linear(config.text.hidden_size, P, bias=False)
        self.visual_projection = nn.Linear(config.vision.hidden_size, P, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # log(1 / 0.07), the temperature

    def text_features(self, ids: Tensor) -> Tensor:
        """Embed ids (B, L), with an EOS in each row, as unit vectors (B, P)."""
        pooled = self.text_model.pool(self.text_model(ids), ids)
        return F.normalize(self.text_projection(pooled), dim=1)

    def image_features(self, x: Tensor) -> Tensor:
        """Embed images (B, 3, image_size, image_size) as unit vectors (B, P).

        What it takes is (images in [0, 1] - IMAGE_MEAN) / IMAGE_STD.
        """
        return F.normalize(self.visual_projection(self.vision_model(x)), dim=1)
