"""Adapters put into a pipeline: LoRAs into its networks, new tokens into its vocabulary."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .. import UserError, shown
from ..files.adapter_files import read_lora, read_tokens
from ..files.atomic import blame
from ..files.embedding_files import Embedding, read_embeddings
from ..models import lora
from ..models.clip import CLIPTextModel
from ..models.prompt_syntax import parse
from ..models.textual_inversion import extend
from ..models.tokenizer import Tokenizer
from ..runtime.distributed import log
from .pipeline import Pipeline


def adapt(
    pipeline: Pipeline,
    loras: Sequence[tuple[str | Path, float]] = (),
    embeddings: Sequence[str | Path] = (),
    merged: bool = True,
) -> Pipeline:
    """Put LoRAs into a pipeline, each with its weight, and textual inversions.

    merged: into the weights, at the speed of the model without them, where these are float32 (in
    bfloat16 small changes would be rounded away); else they stand beside them, named "0", "1", ...,
    and `set_weights` may change their weights.
    Raises UserError for files that do not fit the model.
    """
    parts = pipeline.networks
    text = parts.get("text_encoder")
    inside = []  # tokens in the LoRAs' files
    for i, (path, weight) in enumerate(loras):
        for part, branches in read_lora(path, parts).items():
            lora.load(parts[part], branches, str(i), weight)
        if text is not None:
            tokens = read_tokens(path, text.config.hidden_size)
            inside += [Embedding(Path(path), (name,), value) for name, value in tokens.items()]
    if embeddings:
        if text is None:
            raise UserError(
                f"{embeddings[0]}: this model reads no prompts, so it takes no embedding"
            )
        warn = lambda m: log(f"warning: {m}")  # noqa: E731
        inside = [*read_embeddings(embeddings, text.config.hidden_size, warn), *inside]
    for found in inside:
        add_embedding(pipeline.conditioning.tokenizer, text, found)
    if merged:
        for network in parts.values():
            if next(network.parameters()).dtype == torch.float32:
                lora.merge(network)
    return pipeline


def set_weights(pipeline: Pipeline, weights: Mapping[str, float]) -> None:
    """Set the weights of LoRAs that are not merged, by their names."""
    for network in pipeline.networks.values():
        lora.set_weights(network, weights)
    pipeline.forget()


def add_embedding(tokenizer: Tokenizer, text: CLIPTextModel, found: Embedding) -> None:
    """Put a textual inversion into a vocabulary and its text encoder, and print its names.

    Raises UserError for one that does not fit, and for names that no prompt can hold.
    """
    names = [name for name in found.names if tokenizer.can_hold(name)]
    if odd := [name for name in found.names if name not in names]:
        message = f"{found.path}: {shown(odd[0])} cannot be typed in a prompt"
        if not names:
            raise UserError(f"{message}: rename the file")
        log(f"warning: {message}; use {shown(names[0])}")
    first = len(tokenizer)
    count = len(found.vectors)
    with blame(found.path, kinds=ValueError):
        tokenizer.add_embedding(names, count)
        extend(text, found.vectors, first)
    known = " or ".join(map(shown, names))
    log(f"{found.path.name}: {known}, {count} vector{'s' * (count > 1)}")


def warn_unused(pipeline: Pipeline, prompts: Sequence[str], plain: bool) -> None:
    """Print a warning for each embedding that none of these prompts names.

    plain: whether prompts are taken as they stand.
    """
    if not pipeline.reads_prompts:
        return
    tokenizer = pipeline.conditioning.tokenizer
    texts = prompts if plain else [text or "" for p in prompts for text, _ in parse(p)]
    used = {i for text in texts for i in tokenizer.encode(text)}
    names: dict[int, list[str]] = {}  # the first id of each embedding -> its names
    for name, ids in tokenizer.embeddings.items():
        names.setdefault(ids[0], []).append(name)
    for first, known in names.items():
        if first not in used:
            log(
                f"warning: no prompt has {' or '.join(map(repr, known))}: this --embedding does "
                "nothing"
            )
