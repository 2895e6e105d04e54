"""Captions from outside: texts beside the images, and tables that name images.

    name.txt  name.caption  name.png.txt  name.png.caption    beside name.png, suffixes in any case
    metadata.jsonl  metadata.csv  metadata.parquet            in any folder; names relative to it

A table's caption goes before a text beside the image, and these in the order above. A value is a
text, null (no caption), or a list of texts, of which each step samples one; several rows for one
image are such a list. Anything else is an error: nothing is turned into text that was none.
"""

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from .. import UserError
from ..config import Config
from ..distributed import log
from ..weights.guards import decode_text, open_text
from .folders import SUFFIXES, TEXTS, Scan, inside, listed, report, walk

MOST_CAPTION, MOST_LINE = 1 << 16, 1 << 20  # bytes of a text, characters of a table's line
CAPTION_COLUMNS = ("text", "caption", "prompt", "captions")  # the first of these that there is
NAME_COLUMNS = ("file_name", "filename", "image", "image_path", "file_path", "path")


@dataclass(frozen=True)
class Selection:
    """Which part of a set is used. None: what its names suggest.

    split: a folder's or a hub set's. image_column: of images, or of file names in metadata.*.
    """

    split: str | None = None
    image_column: str | None = None
    caption_column: str | None = None

    @classmethod
    def of(cls, config: Config) -> "Selection":
        return cls(config.split, config.image_column, config.caption_column)


def texts_of(value, where: str) -> tuple[str, ...]:
    """Check a caption from outside: the texts that it is, none for null, NaN and blank ones.

    where: names the value in errors. Raises UserError for what is neither text, list nor null.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    if isinstance(value, list) and not any(isinstance(v, list) for v in value):
        return tuple(dict.fromkeys(text for v in value for text in texts_of(v, where)))
    if not isinstance(value, str):
        raise UserError(f"{where}: the caption is {shortened(value)}; expected a text, a list of "
                        "texts, or null for none")  # fmt: skip
    # JSON may escape halves of characters, which are no text
    text = " ".join(value[:MOST_CAPTION].encode("utf-8", "replace").decode("utf-8").split())
    return (text,) if text else ()


def shortened(value) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def read_captions(
    root: Path, files: list[Path], default: str = "", selection: Selection | None = None,
    found: Scan | None = None,
) -> list[tuple[str, ...]] | None:  # fmt: skip
    """Each file's captions, or None where no file has one and there is no default.

    found: the scan of root, where there is one. Problems are reported in one warning each.
    """
    found = walk(root) if found is None else found
    table = read_tables(found, files, selection or Selection())
    beside, wrong, problems = {}, [], []
    for path in sorted(found.texts, key=lambda p: (p.suffix != p.suffix.lower(), os.fsencode(p))):
        beside.setdefault((path.parent, path.stem, path.suffix.lower()), path)
    captions, sources, some = [], Counter(), False
    for file in files:
        texts, given, source = table.get(file, ()), False, "metadata"
        if not texts:
            names = (file.stem, file.name)
            sides = [beside[key] for name in names for suffix in TEXTS
                     if (key := (file.parent, name, suffix)) in beside]  # fmt: skip
            text = _read_side(sides[0], root, wrong) if sides else None
            if len(sides) > 1:
                wrong.append((str(file), f"several texts; using {sides[0].name!r}"))
            given = text is not None
            texts, source = texts_of(text, str(file)), "texts beside the images"
        some |= bool(texts) or given
        if texts:
            sources[source] += 1
        else:
            kind = "empty caption" if given else "no caption"
            problems.append((str(file), f"{kind}; using {default!r}"))
        captions.append(texts or (default,))
    if not some:
        report("captions have problems", wrong, len(files))
        return [(default,)] * len(files) if default else None
    several = sum(len(texts) > 1 for texts in captions)
    log(
        f"captions: {sources.total():,} of {len(files):,} images have one, from "
        f"{listed(sources.items())}"
        + (f"; {several:,} have several: each step samples one" if several else "")
    )
    report("captions have problems", wrong + problems, len(files))
    return captions


def without_image(found: Scan, files: list[Path]) -> list[Path]:
    """The texts that stand beside no image."""
    known = {(file.parent, name) for file in files for name in (file.stem, file.name)}
    return [path for path in found.texts if (path.parent, path.stem) not in known]


def _read_side(side: Path, root: Path, problems: list) -> str | None:
    """A text beside an image; None, and a problem, for what is not read."""
    if not inside(side, root):
        problems.append((str(side), "leads out of the data folder; not read"))
        return None
    try:
        if not side.is_file():
            return None
        with open(side, "rb") as file:
            raw = file.read(MOST_CAPTION + 1)
        text, encoding = decode_text(raw[:MOST_CAPTION], cut=len(raw) > MOST_CAPTION)
    except (OSError, ValueError) as error:
        problems.append((str(side), f"{getattr(error, 'strerror', None) or error}; not read"))
        return None
    if len(raw) > MOST_CAPTION:
        problems.append((str(side), f"more than {MOST_CAPTION:,} bytes; cut off there"))
    if encoding != "UTF-8":
        problems.append((str(side), f"not UTF-8; read as {encoding}"))
    return text


# --- tables --------------------------------------------------------------------------------------


def read_tables(found: Scan, files: list[Path], selection: Selection) -> dict[Path, tuple]:
    """{image: its captions} from the tables below a folder; says which rows match no image."""
    root, wanted = Path(os.path.abspath(found.root)), selection.caption_column
    images = {Path(os.path.abspath(file)): file for file in found.images}
    near = {(image.parent, image.stem.lower()): image.name for image in images}
    names = (selection.image_column,) if selection.image_column else NAME_COLUMNS
    used, captions, problems, rows, elsewhere = set(files), {}, [], 0, 0
    seen, columns = Counter(), {}
    for table in found.tables:
        if not inside(table, found.root):
            log(f"warning: {str(table)!r} leads out of the data folder and is not read")
            continue
        for line, row in read_rows(table):
            where = f"{table}, line {line}"
            columns |= dict.fromkeys(map(str, row))
            if table.suffix.lower() != ".jsonl" and not (set(names) & row.keys()):
                log(f"warning: {table} has no column {' or '.join(names)} for the images' files "
                    f"and is not used; its columns are {', '.join(map(str, row))}")  # fmt: skip
                break  # a table of something else
            rows += 1
            name = _file_name(row, where, names)
            column = next((c for c in ((wanted,) if wanted else CAPTION_COLUMNS) if c in row), None)
            texts = () if column is None else texts_of(row[column], where)
            if name is None:
                problems.append((where, "no file name"))
                continue
            image = _join(table.parent, name, images)
            if image is not None and image not in used:
                elsewhere += 1
                continue
            if image is None:
                problems.append((f"{where}: {name}", _why(table.parent, name, root, near)))
                continue
            if column is not None:
                seen[column] += 1
            captions[image] = (*captions.get(image, ()), *texts)
    for option in ("caption_column", "image_column"):
        if (name := getattr(selection, option)) and name not in columns:
            raise UserError(f"--{option} {name}: no metadata.* of {found.root} has this column"
                            + (f"; there are {', '.join(columns)}" if columns else ""))  # fmt: skip
    if rows:
        sources = listed((f"column {name}", n) for name, n in seen.items())
        ignored = [c for c in CAPTION_COLUMNS if c in columns and c not in seen]
        more = f"; {', '.join(ignored)} not used" if ignored and seen else ""
        more += "" if seen else f"; the columns are {', '.join(columns)}"
        more += f"; {elsewhere:,} rows are of another split or class" if elsewhere else ""
        log(f"metadata: {rows:,} rows; captions from {sources or 'no column'}{more}")
    report("rows of metadata match no image", problems, rows)
    return {image: tuple(dict.fromkeys(texts)) for image, texts in captions.items()}


def _file_name(row: dict, where: str, names: tuple[str, ...]) -> str | None:
    """The row's image; None where there is none. Raises UserError without a column for it."""
    key = next((name for name in names if name in row), None)
    if key is None:
        raise UserError(f"{where}: no column {' or '.join(names)} for the image's file; there are "
                        f"{shortened(', '.join(map(str, row)))}")  # fmt: skip
    value = row[key]
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {shortened(value)}; expected the name of a file")
    return value


def _join(folder: Path, name: str, images: dict[Path, Path]) -> Path | None:
    """The image of a table's row; \\ may stand for /."""
    for spelled in (name, name.replace("\\", "/"), name.strip()):
        path = Path(os.path.abspath(os.path.join(folder, spelled)))
        if path in images:
            return images[path]
    return None


def _why(folder: Path, name: str, root: Path, near: dict) -> str:
    """Why a row matches no image."""
    path = Path(os.path.abspath(os.path.join(folder, name.replace("\\", "/"))))
    if not path.is_relative_to(root):
        return "lies outside the data folder"
    if "\0" not in name and os.path.isfile(path):
        if path.suffix.lower() not in SUFFIXES:
            return f"{path.suffix or 'no suffix'} is not read as an image"
        return "the image is left out"
    other = near.get((path.parent, path.stem.lower()))
    return f"no such file; there is {other!r}" if other else "no such file"


def read_rows(table: Path) -> Iterator[tuple[int, dict]]:
    """(line, row) of a metadata table. Raises UserError that names the line that is damaged."""
    if table.suffix.lower() == ".parquet":
        return _parquet_rows(table)
    return (_csv_rows if table.suffix.lower() == ".csv" else _json_rows)(table)


def _lines(table: Path, newline: str | None) -> Iterator[str]:
    """Of a table that may be larger than the memory. Raises ValueError for what is no text."""
    file, encoding = open_text(table, newline)
    if encoding != "UTF-8":
        log(f"{table}: not UTF-8; read as {encoding}")
    with file:
        while line := file.readline(MOST_LINE):
            if len(line) == MOST_LINE:
                raise ValueError(f"more than {MOST_LINE:,} characters")
            yield line


def _json_rows(table: Path) -> Iterator[tuple[int, dict]]:
    number, lines = 0, _lines(table, None)
    while True:
        number += 1
        try:
            line = next(lines, None)
            row = json.loads(line) if line and line.strip() else None
        except UserError:  # of the file
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{table}, line {number}: {error!s:.200}; expected a JSON object with "
                            "file_name and text") from None  # fmt: skip
        if line is None:
            return
        if not line.strip():
            continue
        if not isinstance(row, dict):
            raise UserError(f"{table}, line {number}: {shortened(row)} is no JSON object with "
                            "file_name and text")  # fmt: skip
        yield number, row


def _csv_rows(table: Path) -> Iterator[tuple[int, dict]]:
    """Fields are separated by commas, or by what stands in a header without any."""
    lines, number, names = _lines(table, ""), 1, None
    try:
        header = next(lines, "")
        between = next((c for c in ",;\t" if c in header), ",")
        rows = csv.reader(chain([header], lines), delimiter=between, strict=True)
        for row in rows:
            if not row:
                pass
            elif names is None:
                names = [name.strip() for name in row]
                if len(set(names)) < len(names):
                    raise UserError(f"{table}: its header names a column twice: {shortened(row)}")
            elif len(row) != len(names):
                raise UserError(f"{table}, line {number}: {len(row)} fields, {shortened(row)}; the "
                                f"header has {len(names)}: put a text with {between!r} in it "
                                "between quotes")  # fmt: skip
            else:
                yield number, {n: value or None for n, value in zip(names, row)}
            number = rows.line_num + 1
    except UserError:
        raise
    except (csv.Error, ValueError) as error:
        raise UserError(f"{table}, line {number}: {error!s:.200}") from None


def _parquet_rows(table: Path) -> Iterator[tuple[int, dict]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{table} needs the pyarrow library: pip install pyarrow (or datasets); or "
                        "write it as metadata.jsonl") from None  # fmt: skip
    try:
        with parquet.ParquetFile(table) as file:
            number = 0
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, ValueError, RecursionError, MemoryError, ArrowException) as error:
        raise UserError(f"{table} cannot be read: {str(error).split(chr(10))[0]:.200}") from None
