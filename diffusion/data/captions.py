"""Captions from outside: texts beside the images, and tables that name images.

    name.txt  name.caption  name.png.txt  name.png.caption    beside name.png, suffixes in any case
    metadata.jsonl  metadata.csv  metadata.parquet            in any folder; names relative to it

A table's caption goes before a text beside the image, and these in the order above. A value is a
text, null (no caption), or a list of texts, of which each step samples one; several rows for one
image are such a list. Anything else is an error: nothing is turned into text that was none. Where
captions are not used (Selection.captions), what is wrong with them is a warning.
Names are joined as Unicode's NFC where they do not match byte for byte.
"""

import math
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from .. import UserError, shown, some
from ..config import Config
from ..files.text_files import decode_text, read_bytes
from ..runtime.distributed import log
from .folder import TEXTS, Scan, counted, report
from .tables import read_rows

MAX_CAPTION = 1 << 16  # bytes of a text
MAX_NAMELESS = 1000  # rows without a file name, after which a table is of something else
CAPTION_COLUMNS = "text caption prompt captions".split()  # the first of these that there is
NAME_COLUMNS = "file_name filename image image_path file_path path".split()


@dataclass(frozen=True)
class Selection:
    """Says which part of a set is used. None: what its names suggest.

    split: a folder's or a hub set's. image_column: of images, or of file names in metadata.*.
    captions: whether they are used; if not, problems of them are warnings and no errors.
    """

    split: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    captions: bool = field(default=True, compare=False)

    @classmethod
    def of(cls, config: Config) -> "Selection":
        used = config.condition == "text" and config.instance_prompt is None
        return cls(config.split, config.image_column, config.caption_column, used)

    def check(self, columns: Iterable[str], name: str) -> None:
        """Raise UserError for a column that is asked for and is not there."""
        for option in ("caption_column", "image_column"):
            asked = getattr(self, option)
            if asked is not None and asked not in columns:
                raise UserError(
                    f"--{option} {asked}: {name} has no such column; its columns are "
                    f"{some(columns, 20) or 'none'}"
                )


EVERYTHING = Selection()


def texts_of(value, where: Path | str) -> tuple[str, ...]:
    """Check a caption from outside: the texts that it is, none for null, NaN and blank ones.

    where: names the value in errors. Raises UserError for what is neither text, list nor null.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    if isinstance(value, list) and not any(isinstance(v, list) for v in value):
        return tuple(dict.fromkeys(text for v in value for text in texts_of(v, where)))
    if not isinstance(value, str):
        raise UserError(
            f"{where}: the caption is {shown(value)}; expected a text, a list of "
            "texts, or null for none"
        )
    # JSON may escape halves of characters, which are no text
    text = value[:MAX_CAPTION].replace("\ufeff", "").encode("utf-8", "replace").decode("utf-8")
    text = " ".join(text.split())
    return (text,) if text else ()


def nfc(name: str) -> str:
    """Compose a name's accents, which Macs write as characters of their own."""
    return unicodedata.normalize("NFC", name)


def read_captions(
    found: Scan,
    files: list[Path],
    default: str = "",
    selection: Selection = EVERYTHING,
    concepts: Mapping[Path, str] = {},
) -> list[tuple[str, ...]] | None:
    """Find the captions of a scan's files, or None where none has one and there is no default.

    concepts: of files, what stands in for a caption where there is no default.
    Problems are reported in one warning each; those of single images only where captions are used.
    """
    table = read_tables(found, files, selection)
    # exact names replace those that are only alike
    beside = {
        (path.parent, spell(path.stem), path.suffix.lower()): path
        for spell in (nfc, str)
        for path in found.texts
    }
    wrong = []
    missing = []
    captions = []
    sources = Counter()
    is_captioned = False
    for file in files:
        sides = [] if table.get(file) else _texts_beside(file, beside)
        text = _read_side(sides[0], wrong) if sides else None
        texts = table.get(file) or texts_of(text, file)
        if len(sides) > 1:
            wrong.append((file, f"several texts; using {sides[0].name!r}"))
        if texts:
            sources["texts beside the images" if sides else "metadata"] += 1
        elif file in concepts:
            sources["names of folders"] += 1
        else:
            missing.append((file, f"no caption, or an empty one; using {default!r}"))
        is_captioned |= bool(texts) or text is not None
        captions.append(texts or (default or concepts.get(file, ""),))
    if is_captioned:
        log(
            f"captions: {sources.total():,} of {len(files):,} images have one, from "
            f"{counted(sources)}; {sum(len(texts) > 1 for texts in captions):,} have several: "
            "each step samples one"
        )
    if selection.captions:
        report("captions have problems", wrong + missing if is_captioned else wrong, len(files))
    return captions if is_captioned or default or concepts else None


def _texts_beside(file: Path, beside: dict) -> list[Path]:
    """Find the texts of an image, the one that counts first."""
    names = (file.stem, nfc(file.stem), file.name, nfc(file.name))
    keys = [(file.parent, name, suffix) for name in names for suffix in TEXTS]
    return list(dict.fromkeys(beside[key] for key in keys if key in beside))


def _read_side(side: Path, problems: list) -> str | None:
    """Read a text beside an image; None, and a problem, for what is not read."""
    if not side.is_file():
        return None
    try:
        raw = read_bytes(side, MAX_CAPTION + 1, cut=True)
        text, encoding = decode_text(raw[:MAX_CAPTION], cut=len(raw) > MAX_CAPTION)
    except ValueError as error:
        problems.append((side, f"{error}; not read: save it as UTF-8"))
        return None
    if len(raw) > MAX_CAPTION:
        problems.append((side, f"more than {MAX_CAPTION:,} bytes; cut off there"))
    if encoding != "UTF-8":
        problems.append((side, f"not UTF-8; read as {encoding}"))
    return text


# --- tables --------------------------------------------------------------------------------------


def read_tables(found: Scan, files: list[Path], selection: Selection) -> dict[Path, tuple]:
    """Read {image: its captions} from a folder's tables; say which rows match no image."""
    # exact names replace those that are only alike
    images = {spell(os.path.abspath(f)): f for spell in (_alike, str) for f in found.images}
    names = [selection.image_column] if selection.image_column else NAME_COLUMNS
    candidates = [selection.caption_column] if selection.caption_column else CAPTION_COLUMNS
    used = set(files)
    captions = defaultdict(dict)  # {image: {text: None}}: in order, each once
    unmatched = []
    columns = {}
    seen = Counter()
    for table in found.tables:
        try:
            for where, row in _rows(table, names, columns):
                seen["rows"] += 1
                columns.update(row)
                name = next((row[name] for name in names if name in row), None)
                image = _find(images, table.parent, name) if isinstance(name, str) else None
                if not image:
                    unmatched.append((f"{where}: {shown(name)}", "no image has this name"))
                elif image not in used:
                    seen["rows of another split or class"] += 1
                else:
                    for column in candidates:
                        if texts := texts_of(row.get(column), where):
                            captions[image].update(dict.fromkeys(texts))
                            seen[f"captions from column {column}"] += 1
                            break
        except UserError as error:
            if selection.captions:
                raise
            log(f"warning: {error}; captions are not used here: no error")
    if columns or selection.captions or not found.tables:  # else no table could be read
        selection.check(columns, f"metadata.* of {found.root}")
    if seen:
        log(f"metadata: {counted(seen)}; the columns are {some(columns, 20)}")
    report("rows of metadata match no image", unmatched, seen["rows"])
    return {image: tuple(texts) for image, texts in captions.items()}


def _alike(path: str) -> str:
    folder, name = os.path.split(path)
    return nfc(os.path.join(folder, name.strip()))


def _find(images: dict[str, Path], folder: Path, name: str) -> Path | None:
    """Find the image of a row; \\ may stand for /, and accents may be written otherwise."""
    for spelled in (name, name.strip().replace("\\", "/")):
        path = os.path.abspath(folder / spelled)
        for key in (path, _alike(path)):
            if key in images:
                return images[key]
    return None


def _rows(table: Path, names: list[str], columns: dict) -> Iterator[tuple[str, dict]]:
    """Give (where, row) of a table of images; warn of one of something else, or without rows."""
    rows = read_rows(table)
    # only rows of JSON may have columns that others do not have
    head = list(islice(rows, MAX_NAMELESS if table.suffix.lower() == ".jsonl" else 1))
    if any(set(names) & row.keys() for _, row in head):
        yield from chain(head, rows)
        return
    there = {name: None for _, row in head for name in row}
    columns.update(there)
    log(
        f"warning: {table} has no column {' or '.join(names)} for the images' files and is not "
        f"used; its columns are {shown(list(there))}"
    )
