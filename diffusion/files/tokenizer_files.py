"""Read and write the tokenizer's files: tokenizer/ folders, and the vocabulary of single files."""

import gzip
import json
from pathlib import Path

from .. import UserError, shown
from ..models import tokenizer as tokenizers
from ..models.configs import CLIPTextConfig
from ..models.tokenizer import EOS, Tokenizer
from ..runtime.user_cache import cache_folder
from .atomic import blame, write_text
from .text_files import MAX_JSON, read_json, read_optional, read_whole

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a tokenizer/ folder: vocab.json and merges.txt, tokenizer.json, or bpe_simple_vocab.

    Raises UserError for any other folder.
    """
    file = folder / "tokenizer_config.json"
    about = read_optional(file)
    pad = about.get("pad_token") or EOS
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if not isinstance(pad, str):
        raise UserError(f"{file}: pad_token is {shown(pad)}; expected a token")
    length = about.get("model_max_length", 77)
    if type(length) not in (int, float) or not length >= 3:
        raise UserError(f"{file}: model_max_length is {shown(length)}; expected 3 or more")
    # transformers writes 1e30 for "unknown"
    options = {"pad": pad, "context_length": int(length) if length < 10**6 else 77}
    with blame(folder):
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            merges = read_whole(folder / "merges.txt").decode("utf-8-sig")
            vocab, added = (_read_ids(folder / f"{n}.json") for n in ("vocab", "added_tokens"))
            if pad not in vocab:
                raise UserError(f"{file}: pad_token is {shown(pad)}, which the vocabulary lacks")
            return Tokenizer(vocab, merges, **options, added=added)
        if (folder / "tokenizer.json").exists():
            return tokenizers.from_tokenizer_json(read_json(folder / "tokenizer.json"), **options)
        if (folder / VOCABULARY).is_file():
            with gzip.open(folder / VOCABULARY) as file:
                raw = file.read(MAX_JSON + 1)
            if len(raw) > MAX_JSON:
                raise ValueError(f"{VOCABULARY} holds more than {MAX_JSON >> 20} MB")
            return tokenizers.from_bpe_simple_vocab(raw.decode("utf-8-sig"), **options)
    raise UserError(
        f"{folder} holds no vocabulary; expected vocab.json and merges.txt, "
        f"tokenizer.json, or {VOCABULARY}"
    )


def _read_ids(file: Path) -> dict[str, int]:
    """Read {token: id}; {} if the file is missing."""
    ids = read_optional(file)
    for token, i in ids.items():
        if type(i) is not int or i < 0:
            raise UserError(f"{file}: {shown(token)} has the id {shown(i)}; expected 0 or more")
    return ids


def check_tokenizer(tokenizer: Tokenizer, config: CLIPTextConfig, where: str) -> None:
    """Raise UserError for a tokenizer whose tokens or rows a text encoder cannot take."""
    rows = config.max_position_embeddings
    if len(tokenizer) > config.vocab_size or tokenizer.context_length > rows:
        raise UserError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens in rows of "
            f"{tokenizer.context_length}, the text encoder vectors of {config.vocab_size} in rows "
            f"of {rows}; give those of one model"
        )


def find_vocabulary(path: Path) -> Tokenizer:
    """Load the tokenizer of a single file, which holds none: beside it, or from the user's cache.

    Raises UserError if there is none.
    """
    cache = cache_folder()
    for folder in (path.parent / "tokenizer", path.parent, cache):
        try:
            return load_tokenizer(folder)
        except UserError:
            continue
    raise UserError(
        f"{path} holds no vocabulary, as single files do; give --config FOLDER with a "
        f"tokenizer/, or put {VOCABULARY} into {cache}"
    )


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer/ folder as transformers does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files().items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        write_text(folder / name, text)
