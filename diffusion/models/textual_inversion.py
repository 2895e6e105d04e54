"""Textual inversion (arXiv:2208.01618): new tokens, of which only the vectors are learned.

The token embedding of a finished text encoder is given rows for ids beyond its own. They are a
parameter apart, so that all other rows stay what they are, bit for bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip import CLIPTextModel


class ExtendedEmbedding(nn.Embedding):
    """`base`, and rows `new` (n, D) for the ids that follow its own. Its weight keeps its name."""

    def __init__(self, base: nn.Embedding, new: Tensor):
        super().__init__(*base.weight.shape, _weight=base.weight)
        self.weight = base.weight
        self.new = nn.Parameter(new)

    def forward(self, ids: Tensor) -> Tensor:
        V = self.num_embeddings
        old = super().forward(ids.clamp(max=V - 1))
        new = F.embedding((ids - V).clamp(min=0), self.new).to(old.dtype)
        return torch.where((ids >= V)[..., None], new, old)


def extend(model: CLIPTextModel, rows: Tensor, first: int) -> nn.Parameter:
    """Add rows (n, D) for the ids `first` ... first + n - 1; returns all new rows so far.

    Raises ValueError unless `first` is the number of rows that there are.
    """
    embeddings = model.text_model.embeddings
    base = embeddings.token_embedding
    rows = rows.detach().float().clone()
    count = base.num_embeddings
    if isinstance(base, ExtendedEmbedding):
        count += len(base.new)
        rows = torch.cat([base.new.detach(), rows.to(base.new.device)])
    if first != count:
        raise ValueError(
            f"the tokenizer has {first} tokens, the text encoder {count}: new ones would get "
            "the vectors of others; use files of one model"
        )
    embeddings.token_embedding = ExtendedEmbedding(base, rows.to(base.weight.device))
    return embeddings.token_embedding.new


def new_rows(model: CLIPTextModel) -> nn.Parameter:
    """Return all rows that `extend` added."""
    return model.text_model.embeddings.token_embedding.new


@torch.no_grad()
def initial_rows(model: CLIPTextModel, ids: list[int], vectors: int) -> Tensor:
    """Take rows (vectors, D) to start from: the vectors of a word's ids.

    A word of more ids than vectors (one for each byte, in a byte-level vocabulary) is cut into as
    many parts, of which the means are taken; one of fewer is repeated.
    """
    rows = model.text_model.embeddings.token_embedding.weight[ids].float()
    if len(rows) < vectors:
        return rows.repeat(-(-vectors // len(rows)), 1)[:vectors]
    return torch.stack([part.mean(0) for part in rows.tensor_split(vectors)])
