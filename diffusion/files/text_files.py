"""Read texts and JSON that other people wrote: bounded in size, in whatever encoding they have."""

import codecs
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from .. import UserError
from ..runtime.distributed import log
from .atomic import blame, open_regular

MAX_TEXT = 64 << 20  # bytes of a list of prompts; of a longer table, those that tell the encoding
MAX_JSON = 8 << 20  # of a JSON or vocabulary file, parsed 25 times more; the largest known has 4 MB
# the bytes at a text's start that say how it is encoded; UTF-32's begin like UTF-16's
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f]")  # in no text of one byte a character
# Cyrillic, Greek, GBK ... are texts in it as well, of accented letters and signs
WESTERN = "cp1252 (Windows, Western Europe; if it is of another code page, save the file as UTF-8)"
PADDING = b"\0 \t\r\n"  # what may follow a text, zero bytes of C's strings too


def read_bytes(path: Path, limit: int = MAX_TEXT, cut: bool = False) -> bytes:
    """Read a file, cut off at the limit or refused beyond it.

    Raises UserError if it is missing, no regular file, or of absurd size.
    """
    with blame(f"{path} cannot be read"), open_regular(path, None if cut else limit) as file:
        return file.read(limit)


def stand_in(head: bytes) -> str | None:
    """Say what lies in place of a file, by its first bytes, and what helps; None: maybe it."""
    text = head.lstrip(codecs.BOM_UTF8 + b" \t\r\n")
    if not head:
        return "is empty: download it again"
    if text.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS to the file: run `git lfs pull` in its folder"
    if text.startswith(b"<"):
        return "is a web page (HTML or XML), not the file that it links to: download that"
    return None


def read_whole(path: Path) -> bytes:
    """Read a JSON or vocabulary file. Raises UserError if the file is missing or not all there."""
    raw = read_bytes(path, MAX_JSON)
    if what := stand_in(raw):
        raise UserError(f"{path} {what}")
    return raw


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises UserError if the file is missing or holds none."""
    return parse_json(read_whole(path), path)


def read_optional(path: Path) -> dict:
    """Read a JSON object; {} if the file is missing."""
    return read_json(path) if path.exists() else {}


def parse_json(text: str | bytes, where: Path | str) -> dict:
    """Parse a JSON object, of a text that was read within bounds.

    Raises UserError for any other text, and one too deep.
    """
    with blame(f"{where} is no JSON"):
        values = json.loads(text)
    if not isinstance(values, dict):
        raise UserError(f"{where} holds a {type(values).__name__}; expected an object")
    return values


# --- texts that people write ---------------------------------------------------------------------


def read_text_file(path: Path) -> tuple[str, str]:
    """Read a text in whatever encoding it has: (text, the encoding's name), lines end with \\n.

    Raises UserError if the file is missing, of absurd size or no text.
    """
    raw = read_bytes(path)
    with blame(path, "; save it as UTF-8"):
        return decode_text(raw)


def read_prompt_lines(path: Path) -> list[str]:
    """Read a prompt a line, without blank lines, and say so where the file was not UTF-8.

    Raises UserError as `read_text_file` does, and for a file without any.
    """
    text, encoding = read_text_file(path)
    if encoding != "UTF-8":
        log(f"{path}: not UTF-8; read as {encoding}")
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{path} holds no prompt: write one a line")
    return lines


def prompts_of(options: Sequence[str]) -> list[str]:
    """Read prompts as --prompt takes them: a text, @FILE for a prompt a line, @@TEXT for @TEXT.

    Raises UserError for a file that cannot be read or holds no prompt.
    """
    found = []
    for text in options:
        if not text.startswith("@") or text.startswith("@@"):
            found.append(text.removeprefix("@"))
            continue
        try:
            found += read_prompt_lines(Path(os.path.expanduser(text[1:])))
        except UserError as error:
            raise UserError(
                f"--prompt {text}: {error}; a prompt that itself begins with @ is written @{text}"
            ) from None
    return found


def decode_text(raw: bytes, cut: bool = False) -> tuple[str, str]:
    """Decode by the mark at the start, else as UTF-8, else as UTF-16 or Windows' cp1252.

    (text, the encoding's name). Lines end with \\n, for \\r\\n and \\r too; what else Unicode takes
    for ends of lines stays. Byte-order marks inside, which joined files have, and zero bytes at the
    end are dropped. cut: the last character may be incomplete.
    Raises ValueError, which says what is wrong, for what is no text.
    """
    codec, name = _encoding(raw, cut)
    try:
        text = codecs.getincrementaldecoder(codec)().decode(raw, final=not cut)
    except UnicodeDecodeError as error:
        raise ValueError(f"not {name}: {error.reason}") from None
    return re.sub("\r\n?", "\n", plain_text(text)), name


def plain_text(text: str) -> str:
    """Drop byte-order marks, and zeros at the end. Raises ValueError for zeros elsewhere."""
    text = text.replace("\ufeff", "")
    body = text.rstrip(PADDING.decode())
    if "\0" in body:
        raise ValueError("not a text: it holds zero bytes")
    return body + text[len(body) :].replace("\0", "")


def open_text(path: Path) -> tuple[TextIO, str]:
    """Open a text that may be larger than the memory: (file, the encoding's name).

    Its first MAX_TEXT bytes tell the encoding. Ends of lines stay as they are. Raises UserError as
    `read_text_file` does.
    """
    raw = read_bytes(path, MAX_TEXT, cut=True)
    with blame(path, "; save it as UTF-8"):
        codec, name = _encoding(raw, cut=len(raw) == MAX_TEXT)
    return open(path, encoding=codec, newline=""), name


def _encoding(raw: bytes, cut: bool) -> tuple[str, str]:
    """Find (codec, its name) of a text, whose last character may be incomplete if cut.

    Raises ValueError for what is no text, and for one of an unknown code page.
    """
    for mark, codec in MARKS.items():
        if raw.startswith(mark):
            return codec, codec.removesuffix("-sig").upper()
    body = raw.rstrip(PADDING)
    # Latin letters, digits and blanks in UTF-16: every second byte is 0
    pairs = len(body) // 2
    zeros = [body[i : 2 * pairs : 2].count(0) for i in (0, 1)]
    if min(zeros) < 0.05 * pairs and max(zeros) > 0.3 * pairs:
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be", "UTF-16"
    wrong = None
    try:
        body.decode()
    except UnicodeDecodeError as error:
        if not cut or error.reason != "unexpected end of data":
            wrong = error.reason
    # zero bytes at the end are those of C's strings, or half of UTF-16's last character
    if any(zeros) or (0 in raw[len(body) :] and (wrong or not body)):
        raise ValueError("not a text: it holds zero bytes")
    if wrong is None:
        return "utf-8", "UTF-8"
    if CONTROL.search(body):
        raise ValueError(f"not a text: {wrong}")
    try:
        body.decode("cp1252")
    except UnicodeDecodeError:
        raise ValueError("neither UTF-8, UTF-16 or UTF-32 nor cp1252") from None
    return "cp1252", WESTERN
