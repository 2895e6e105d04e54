"""Read and write the tokenizer's files: tokenizer/ folders, and the vocabulary of single files."""

import gzip
import json
import os
from pathlib import Path

from .. import UserError
from ..models import tokenizer as tokenizers
from ..models.tokenizer import EOS, Tokenizer
from .atomic import blame, write_text
from .text_files import MAX_JSON, read_bytes, read_json, read_optional

VOCABULARY = "bpe_simple_vocab_16e6.txt"


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a tokenizer/ folder: vocab.json and merges.txt, tokenizer.json, or bpe_simple_vocab.

    Raises UserError for any other folder.
    """
    file = folder / "tokenizer_config.json"
    about = read_optional(file)
    pad = about.get("pad_token") or EOS
    pad = pad.get("content") if isinstance(pad, dict) else pad
    with blame(file):
        length = int(about.get("model_max_length", 77))  # transformers writes 1e30 for "unknown"
    options = {"pad": pad, "context_length": length if abs(length) < 10**6 else 77}
    with blame(folder):
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            merges = read_bytes(folder / "merges.txt", MAX_JSON).decode("utf-8-sig")
            added = read_optional(folder / "added_tokens.json")
            return Tokenizer(read_json(folder / "vocab.json"), merges, **options, added=added)
        if (folder / "tokenizer.json").exists():
            return tokenizers.from_tokenizer_json(read_json(folder / "tokenizer.json"), **options)
        for name, opener in ((VOCABULARY, open), (f"{VOCABULARY}.gz", gzip.open)):
            if (folder / name).is_file():
                with opener(folder / name, "rb") as file:
                    raw = file.read(MAX_JSON + 1)
                if len(raw) > MAX_JSON:
                    raise ValueError(f"{name} holds more than {MAX_JSON >> 20} MB: no vocabulary")
                return tokenizers.from_bpe_simple_vocab(raw.decode("utf-8-sig"), **options)
    raise UserError(
        f"{folder} holds no vocabulary; expected vocab.json and merges.txt, "
        f"tokenizer.json, or {VOCABULARY}.gz"
    )


def find_vocabulary(path: Path) -> Tokenizer:
    """Load the tokenizer of a single file, which holds none: beside it, or from the user's cache.

    Raises UserError if there is none.
    """
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
    """Write a tokenizer/ folder as transformers does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files().items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        write_text(folder / name, text)
