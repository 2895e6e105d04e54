"""What a file is asked before a library reads it, and its tensors before a network takes them.

The libraries refuse code (weights_only) and overlapping tensors (safetensors). What is left is
that a small file may ask for much memory, and that numbers may be none.
"""

import codecs
import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import struct
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

import torch
from torch import Tensor

from .. import UserError
from ..runtime.distributed import log

MOST_HEADER = 32 << 20  # bytes; Stable Diffusion's is 0.2 MB
MOST_TEXT = 64 << 20  # of a list of prompts
MOST_JSON = (
    8 << 20
)  # of a JSON or vocabulary file, parsed 25 times more; the largest known has 4 MB
MOST_PICKLE = 8 << 20  # names, shapes and settings; a training state of SDXL has 2 MB
OLD_PICKLES = 5  # before torch 1.6: magic number, version, system, the object, its storages' keys
# what checkpoints name, as torch.save writes it; the last rows are files.STUBS
NEEDED = re.compile(
    r"torch\._utils _rebuild_(tensor(_v[23])?|parameter(_with_state)?)"
    r"|torch\.nn\.parameter Parameter|torch (Size|device)"
    r"|torch(\.cuda)? \w+Storage|torch\.storage UntypedStorage"
    r"|torch (bool|b?float\d+(_e\dm\d\w*)?|u?int\d+|complex\d+)"
    r"|collections (OrderedDict|Counter)|(__builtin__|builtins) (set|complex)"
    r"|(pytorch_)?lightning(\.pytorch)?\.callbacks\.\w+ (ModelCheckpoint|EarlyStopping)"
    r"|torch\.nn\.modules\.container ParameterDict"
)
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
DTYPES = FLOATS | {
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
}
MARK = b"sha256:"
# the bytes at a text's start that say how it is encoded; UTF-32's begin like UTF-16's
MARKS = (
    (codecs.BOM_UTF8, "utf-8", "UTF-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32-be", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16-le", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16-be", "UTF-16"),
)
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f]")  # in no text of one byte a character
UNDEFINED = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")  # in cp1252
WESTERN = "cp1252 (Windows, Western Europe)"
# letters of cp1252 beyond ASCII, as bytes
ACCENTED = bytes(i for i in range(128, 256) if bytes([i]).decode("cp1252", "ignore").isalpha())
PLAIN = bytes(i for i in range(128) if chr(i).isalpha())
# a word of accented letters only: none in Western Europe, each one in Cyrillic, Greek, GBK ...
FOREIGN_WORD = re.compile(
    rb"(?<![A-Za-z%(a)s])[%(a)s]{3,}(?![A-Za-z%(a)s])" % {b"a": re.escape(ACCENTED)}
)
PADDING = b"\0 \t\r\n"  # what may follow a text, zero bytes of C's strings too


def check_size(path: Path) -> None:
    """Raises UserError if reading the file would take more memory than it has bytes, and
    UnpicklingError for a pickle of other things than weights."""
    with open(path, "rb") as file:
        head = file.read(8)
        size = file.seek(0, os.SEEK_END)
    safetensors = path.suffix.lower() == ".safetensors"
    if safetensors and int.from_bytes(head, "little") > min(size, MOST_HEADER):
        raise UserError(
            f"{path} is damaged or not to be trusted: its header would have "
            f"{int.from_bytes(head, 'little'):,} bytes"
        )
    try:
        packed = zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged or incomplete: {error}") from None
    if packed:
        check_zip(path, size)
    elif size and not safetensors:  # of before torch 1.6: pickles, then the numbers
        with open(path, "rb") as file:
            text = io.BytesIO(file.read(MOST_PICKLE))
        for _ in range(OLD_PICKLES):
            check_pickle(text)


def check_zip(path: Path, size: int) -> None:
    """torch and NumPy store, and never compress; so entries cannot be more than the file."""
    try:
        with zipfile.ZipFile(path) as z:
            entries = z.infolist()
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            total = sum(entry.file_size for entry in entries)
            # torch finds data.pkl by its name in small letters
            pickles = [e for e in entries if e.filename.lower().endswith(".pkl")]
            wrong = packed or total > size or any(e.file_size > MOST_PICKLE for e in pickles)
            texts = [] if wrong else [z.read(e) for e in pickles]
    except Exception as error:  # a zip file can be damaged in many ways
        raise UserError(f"{path} is damaged or incomplete: {str(error)[:200]}") from None
    if packed or total > size:
        raise UserError(
            f"{path} is not to be trusted: {size:,} bytes would become {total:,}, and "
            "weight files are never compressed"
        )
    if wrong:
        raise UserError(
            f"{path} is not to be trusted: what it holds beside its tensors is more "
            f"than {MOST_PICKLE >> 20} MB"
        )
    for text in texts:
        check_pickle(io.BytesIO(text))


def check_pickle(file: io.BytesIO) -> None:
    """Reads one pickle without doing what it says. Raises UnpicklingError, as torch would, if it
    asks for a name that tensors do not need: weights_only calls some that take any memory."""
    try:
        for opcode, value, _ in pickletools.genops(file):
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise pickle.UnpicklingError(f"it asks for names by {opcode.name}")
            if opcode.name == "GLOBAL" and not NEEDED.fullmatch(value):
                raise pickle.UnpicklingError(f"it asks for {value.replace(' ', '.'):.100}")
    except (ValueError, IndexError, struct.error) as error:
        raise pickle.UnpicklingError(f"it is no pickle: {error!s:.100}") from None


def check_tensors(tensors: dict[str, Tensor], where: str) -> None:
    """Raises UserError for tensors that claim more than is stored, for kinds that no network has
    (sparse, quantized, complex, without storage), and for NaN and infinity."""
    bad = []
    for name, value in tensors.items():
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.is_nested or value.dtype not in DTYPES:
            kind = value.dtype if plain else f"{value.layout} on {value.device.type}"
            raise UserError(
                f"{where}: {name!r:.200} is {kind}; expected plain numbers, such as float32"
            )
        if value.numel():
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(
                    f"{where} is not to be trusted: {name!r:.200} claims "
                    f"{value.numel():,} values, more than the file holds"
                )
            if value.is_floating_point() and not finite(value):
                bad.append(name)
    if bad:
        raise UserError(
            f"{where} holds NaN or infinity in {len(bad)} of {len(tensors)} tensors, "
            f"such as {bad[0]!r}: the training that made it diverged"
        )


def finite(value: Tensor) -> bool:
    """Without a copy: minimum and maximum are NaN where one value is."""
    known = value.dtype in FLOATS
    return bool(torch.stack(torch.aminmax(value if known else value.float())).isfinite().all())


class TarMember(tarfile.TarInfo):
    """Refuses headers that hold more than a name: they are read into memory before any check."""

    @classmethod
    def frombuf(cls, *args, **kwargs):
        found = super().frombuf(*args, **kwargs)
        plain = found.isreg() or found.isdir() or found.issym() or found.islnk()
        if not plain and found.size > 1 << 16:
            raise tarfile.ReadError(f"a header of {found.size:,} bytes")
        return found


def read_bytes(path: Path, most: int = MOST_TEXT) -> bytes:
    """Raises UserError if it is missing, no regular file, or of absurd size."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no text file: no regular file")
    try:
        with open(path, "rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(raw) > most:
        raise UserError(f"{path} is no text file of at most {most >> 20} MB")
    return raw


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """Raises UserError if it is missing, of absurd size or not UTF-8, with or without its mark."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error.reason}") from None


def read_json(path: Path) -> dict:
    """Raises UserError if it is missing or no JSON object."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    return parse_json(read_text(path, MOST_JSON), str(path))


def parse_json(text: str, where: str) -> dict:
    """Raises UserError for what is no JSON object, as for one too large or too deep to be read."""
    if len(text) > MOST_JSON:
        raise UserError(
            f"{where} has {len(text):,} characters; at most {MOST_JSON >> 20} MB are read"
        )
    try:
        values = json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{where} is no JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{where} holds a {type(values).__name__}; expected an object")
    return values


# --- texts that people write ---------------------------------------------------------------------


def read_text_file(path: Path, most: int = MOST_TEXT) -> tuple[str, str]:
    """Read a text in whatever encoding it has: (text, the encoding's name), lines end with \\n.

    Raises UserError if the file is missing, of absurd size or no text.
    """
    raw = read_bytes(path, most)
    try:
        return decode_text(raw)
    except ValueError as error:
        raise UserError(f"{path} {error}; save it as UTF-8") from None


def read_prompt_lines(path: Path) -> list[str]:
    """Read a prompt a line, without blank lines, and say so where the file was not UTF-8.

    Raises UserError as `read_text_file` does.
    """
    text, encoding = read_text_file(path)
    if encoding != "UTF-8":
        log(f"{path}: not UTF-8; read as {encoding}")
    return [line for line in text.split("\n") if line.strip()]


def prompts_of(options: Sequence[str]) -> list[str]:
    """Read prompts as --prompt takes them: a text, @FILE for a prompt a line, @@TEXT for @TEXT.

    Raises UserError for a file that cannot be read or holds no prompt.
    """
    found = []
    for text in options:
        if not text.startswith("@"):
            found.append(text)
        elif text.startswith("@@"):
            found.append(text[1:])
        else:
            try:
                lines = read_prompt_lines(Path(text[1:]))
            except UserError as error:
                raise UserError(
                    f"--prompt {text}: {error}; a prompt that itself begins with @ is "
                    f"written @{text}"
                ) from None
            if not lines:
                raise UserError(f"--prompt {text}: the file holds no prompt")
            found += lines
    return found


def decode_text(raw: bytes, cut: bool = False) -> tuple[str, str]:
    """Decode by the mark at the start, else as UTF-8, else as UTF-16 or Windows' cp1252.

    (text, the encoding's name). Lines end with \\n, for \\r\\n and \\r too; what else Unicode takes
    for ends of lines stays. Byte-order marks inside, which joined files have, and zero bytes at the
    end are dropped. cut: the last character may be incomplete.
    Raises ValueError, which says what is wrong, for what is no text.
    """
    body = raw.rstrip(PADDING)
    mark, codec, name = _encoding(raw, [body], cut, 0 in raw[len(body) :])
    decoder = codecs.getincrementaldecoder(codec)()
    try:
        text = decoder.decode(raw[len(mark) :], final=not cut)
    except UnicodeDecodeError as error:
        raise ValueError(f"is no {name} text: {error.reason}") from None
    return plain_text(text).replace("\r\n", "\n").replace("\r", "\n"), name


def plain_text(text: str) -> str:
    """Drop byte-order marks, and zeros at the end. Raises ValueError for zeros elsewhere."""
    text = text.replace("\ufeff", "")
    body = text.rstrip(PADDING.decode())
    if "\0" in body:
        raise ValueError("is no text: it holds zero bytes")
    return body + text[len(body) :].replace("\0", "")


def open_text(path: Path, newline: str | None = None) -> tuple[TextIO, str]:
    """Open a text that may be larger than the memory: (file, the encoding's name).

    It is read once to find the encoding. newline: as `open` takes it. Raises UserError as
    `read_text_file` does.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no text file: no regular file")
    try:
        file = open(path, "rb")
        head = file.read(4)
        end, ended = _end(file)
        mark, codec, name = _encoding(head, _chunks(file, end), False, ended)
        file.seek(len(mark))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} {error}; save it as UTF-8") from None
    return io.TextIOWrapper(file, encoding=codec, newline=newline), name


def _end(file: BinaryIO, step: int = 1 << 16) -> tuple[int, bool]:
    """Where a file ends without its PADDING, and whether zero bytes are in that."""
    place = file.seek(0, os.SEEK_END)
    zeros = False
    while place > 0:
        start = max(0, place - step)
        file.seek(start)
        text = file.read(place - start)
        body = text.rstrip(PADDING)
        zeros = zeros or 0 in text[len(body) :]
        if body:
            return start + len(body), zeros
        place = start
    return 0, zeros


def _chunks(file: BinaryIO, end: int, step: int = 1 << 20) -> Iterator[bytes]:
    file.seek(0)
    for place in range(0, end, step):
        yield file.read(min(step, end - place))


def _encoding(
    head: bytes, chunks: Iterable[bytes], cut: bool, ended: bool
) -> tuple[bytes, str, str]:
    """(mark, codec, its name) of a text without its PADDING, in chunks of even length.

    ended: zero bytes follow, as after C's strings; in UTF-16 they are half of the last character.
    Raises ValueError for what is no text, and for one of an unknown code page.
    """
    if marked := next((row for row in MARKS if head.startswith(row[0])), None):
        return marked
    decoder = codecs.getincrementaldecoder("utf-8")()
    wrong = None
    control = False
    gaps = False
    size = 0
    zeros = [0, 0]
    plain = 0
    accented = 0
    foreign = False
    for chunk in chunks:
        size += len(chunk)
        if 0 in chunk:
            zeros = [n + chunk[i : len(chunk) // 2 * 2 : 2].count(0) for i, n in enumerate(zeros)]
        if wrong is None:
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                wrong = error.reason
        control = control or CONTROL.search(chunk)
        gaps = gaps or UNDEFINED.search(chunk)
        plain += len(chunk) - len(chunk.translate(None, PLAIN))
        accented += len(chunk) - len(chunk.translate(None, ACCENTED))
        foreign = foreign or FOREIGN_WORD.search(chunk)
    if wrong is None and not cut:
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            wrong = error.reason
    # Latin letters, digits and blanks in UTF-16: every second byte is 0
    pairs = size // 2
    if pairs and min(zeros) < 0.05 * pairs and max(zeros) > 0.3 * pairs:
        return b"", "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be", "UTF-16"
    if any(zeros) or (ended and (size == 0 or wrong is not None)):
        raise ValueError("is no text: it holds zero bytes")
    if wrong is None:
        return b"", "utf-8", "UTF-8"
    if control:
        raise ValueError(f"is no text: {wrong}")
    if gaps:
        raise ValueError(f"is neither UTF-8, UTF-16 or UTF-32 nor {WESTERN}")
    doubt = "; this looks like another code page: check it, or save the file as UTF-8"
    return b"", "cp1252", WESTERN + (doubt if foreign or accented > plain else "")


# --- digests -------------------------------------------------------------------------------------


def seal(path: Path) -> None:
    """Put the digest of a zip file's bytes at its end, as the comment that zip files may have."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        digest = _digest(file, size - 2)
        comment = MARK + digest
        file.seek(size - 2)  # the comment's length, 0 until now
        file.write(len(comment).to_bytes(2, "little") + comment)


def check_seal(path: Path) -> None:
    """Raises UserError if the file is not what was written. One without a digest passes."""
    tail = len(MARK) + 64
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - tail))
        comment = file.read()
        if comment.startswith(MARK) and _digest(file, size - tail - 2) != comment[len(MARK) :]:
            raise UserError(
                f"{path} is damaged: its bytes have not the digest that was written with them"
            )


def _digest(file, size: int) -> bytes:
    file.seek(0)
    h = hashlib.sha256()
    left = size
    while left > 0 and (chunk := file.read(min(left, 1 << 22))):
        h.update(chunk)
        left -= len(chunk)
    return h.hexdigest().encode()


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """Of names, types, shapes and bytes, whatever their order."""
    h = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        h.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        h.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return h.hexdigest()
