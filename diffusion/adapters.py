"""Adapters put into a pipeline: LoRAs into its networks, new tokens into its vocabulary."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from . import UserError
from .latent import TextConditioned, TextEncoder
from .models import lora
from .models.clip import CLIPTextModel
from .models.textual_inversion import extend
from .models.tokenizer import Tokenizer
from .pipeline import Pipeline
from .weights.adapters import read_lora
from .weights.embeddings import read_embedding


def networks(pipeline: Pipeline) -> dict[str, nn.Module]:
    """The parts that adapter files name: unet and, where there is one, text_encoder."""
    text = getattr(pipeline, "text", None)
    apart = {"text_encoder": text.model} if isinstance(text, TextEncoder) else {}
    return parts_of(pipeline.model) | apart


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    if isinstance(model, TextConditioned):
        return {"unet": model.unet, "text_encoder": model.text}
    return {"unet": model}


def adapt(pipeline: Pipeline, loras: Sequence[tuple[str | Path, float]] = (),
          embeddings: Sequence[str | Path] = (), merged: bool = True) -> Pipeline:  # fmt: skip
    """The pipeline with these LoRAs, each with its weight, and these textual inversions.

    merged: into the weights, at the speed of the model without them, where these are float32 (in
    bfloat16 small changes would be rounded away); else they stand beside them, named "0", "1", ...,
    and `set_weights` may change their weights.
    Raises UserError for files that do not fit the model.
    """
    parts = networks(pipeline)
    for i, (path, weight) in enumerate(loras):
        for part, branches in read_lora(path, parts).items():
            lora.load(parts[part], branches, str(i), weight)
    if embeddings and "text_encoder" not in parts:
        raise UserError(f"{embeddings[0]}: this model reads no prompts, so it takes no embedding")
    for path in embeddings:
        text = parts["text_encoder"]
        for token, vectors in read_embedding(path, text.config.hidden_size).items():
            add_token(pipeline.text.tokenizer, text, token, vectors, str(path))
    if merged:
        for network in parts.values():
            if next(network.parameters()).dtype == torch.float32:
                lora.merge(network)
    return pipeline


def set_weights(pipeline: Pipeline, weights: Mapping[str, float]) -> None:
    """Of LoRAs that are not merged, by their names."""
    for network in networks(pipeline).values():
        lora.set_weights(network, weights)
    pipeline.forget()


def add_token(tokenizer: Tokenizer, text: CLIPTextModel, token: str, rows, where: str):
    """A token whose vectors are `rows` (n, D); all new vectors of the encoder are returned.

    Raises UserError if it exists.
    """
    first = len(tokenizer)
    try:
        tokenizer.add_tokens([token], len(rows))
        return extend(text, rows, first)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
