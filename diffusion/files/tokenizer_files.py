"""The tokenizer's files: tokenizer/ folders, and the vocabulary of single files."""

import gzip
import json
import os
import zlib
from pathlib import Path

from .. import UserError
from ..models import tokenizer as tokenizers
from ..models.tokenizer import Tokenizer
from .checkpoint import write_text
from .validate import MOST_JSON, read_json, read_text

VOCABULARY = "bpe_simple_vocab_16e6.txt"


def load_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer/ folder: vocab.json and merges.txt, tokenizer.json, or bpe_simple_vocab."""
    about = folder / "tokenizer_config.json"
    about = read_json(about) if about.exists() else {}
    pad = about.get("pad_token", tokenizers.EOS)
    length = about.get("model_max_length", 77)  # transformers writes 1e30 for "unknown"
    if not isinstance(length, int | float) or not isinstance(pad, str | dict | None):
        raise UserError(
            f"{folder / 'tokenizer_config.json'} has a model_max_length of {length!r} "
            f"and a pad_token of {pad!r}; expected a number and a text"
        )
    options = {
        "pad": pad.get("content") if isinstance(pad, dict) else pad or tokenizers.EOS,
        "context_length": int(length) if length < 10**6 else 77,
    }
    try:
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            merges = read_text(folder / "merges.txt", MOST_JSON)
            added = folder / "added_tokens.json"
            return Tokenizer(
                read_json(folder / "vocab.json"),
                merges,
                **options,
                added=read_json(added) if added.exists() else None,
            )
        if (folder / "tokenizer.json").exists():
            return tokenizers.from_tokenizer_json(read_json(folder / "tokenizer.json"), **options)
        for name in (VOCABULARY, f"{VOCABULARY}.gz"):
            if (folder / name).exists():
                return tokenizers.from_bpe_simple_vocab(_read_vocabulary(folder / name), **options)
    except UserError:
        raise
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{folder}: {error}") from None
    raise UserError(
        f"{folder} holds no vocabulary; expected vocab.json and merges.txt, "
        f"tokenizer.json, or {VOCABULARY}.gz"
    )


def _read_vocabulary(path: Path) -> str:
    if path.suffix != ".gz":
        return read_text(path, MOST_JSON)
    with gzip.open(path) as file:
        raw = file.read(MOST_JSON + 1)
    if len(raw) > MOST_JSON:
        raise UserError(f"{path} holds more than {MOST_JSON >> 20} MB: no vocabulary")
    return raw.decode("utf-8")


def find_vocabulary(path: Path) -> Tokenizer:
    """For a single file, which has none: beside it, or in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion"
    for folder in (path.parent / "tokenizer", path.parent, cache):
        try:
            return load_tokenizer(folder)
        except UserError:
            continue
    raise UserError(
        f"{path} holds no vocabulary, as single files do; give --config FOLDER with a "
        f"tokenizer/, or put {VOCABULARY}.gz into {cache}"
    )


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files().items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        write_text(folder / name, text)
