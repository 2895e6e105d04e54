"""Captions from outside: texts beside the images, and tables that name images.

    name.txt  name.caption  name.png.txt  name.png.caption    beside name.png, suffixes in any case
    metadata.jsonl  metadata.csv  metadata.parquet            in any folder; names relative to it

A table's caption goes before a text beside the image, and these in the order above. A value is a
text, null (no caption), or a list of texts, of which each step samples one; several rows for one
image are such a list. Anything else is an error: nothing is turned into text that was none. Where
captions are not used (Selection.captions), what is wrong with them is a warning.

A .csv has texts only. As pandas writes and reads it, NULLS are null, and "['a cat', 'a dog']" is a
list. Names are joined as Unicode's NFC where they do not match byte for byte.
"""

import csv
import json
import math
import os
import re
import unicodedata
from ast import literal_eval
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from .. import UserError
from ..config import Config
from ..files.validate import decode_text, open_text, plain_text
from ..runtime.distributed import log
from .folder import SUFFIXES, TEXTS, Scan, inside, listed, report, walk

MOST_CAPTION = 1 << 16
MOST_LINE = 1 << 20  # bytes of a text, characters of a table's line
MOST_NAMELESS = 1000  # rows without a file name, after which a table is of something else
CAPTION_COLUMNS = ("text", "caption", "prompt", "captions")  # the first of these that there is
NAME_COLUMNS = ("file_name", "filename", "image", "image_path", "file_path", "path")
# what pandas.read_csv takes for missing values, and with it Hugging Face's ImageFolder
NULLS = {
    "",
    "#N/A",
    "#N/A N/A",
    "#NA",
    "-1.#IND",
    "-1.#QNAN",
    "-NaN",
    "-nan",
    "1.#IND",
    "1.#QNAN",
    "<NA>",
    "N/A",
    "NA",
    "NULL",
    "NaN",
    "None",
    "n/a",
    "nan",
    "null",
}
# one item of a list as Python, NumPy (blanks between) and JSON write it
ITEM = re.compile(
    r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|None|null|nan|NaN)(?:\s*,\s*|\s+|$)""", re.DOTALL
)


@dataclass(frozen=True)
class Selection:
    """Which part of a set is used. None: what its names suggest.

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


def texts_of(value, where: str) -> tuple[str, ...]:
    """Check a caption from outside: the texts that it is, none for null, NaN and blank ones.

    where: names the value in errors. Raises UserError for what is neither text, list nor null.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    if isinstance(value, list) and not any(isinstance(v, list) for v in value):
        return tuple(dict.fromkeys(text for v in value for text in texts_of(v, where)))
    if not isinstance(value, str):
        raise UserError(
            f"{where}: the caption is {shortened(value)}; expected a text, a list of "
            "texts, or null for none"
        )
    # JSON may escape halves of characters, which are no text
    text = value[:MOST_CAPTION].replace("\ufeff", "").encode("utf-8", "replace").decode("utf-8")
    text = " ".join(text.split())
    return (text,) if text else ()


def shortened(value) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def read_captions(
    root: Path,
    files: list[Path],
    default: str = "",
    selection: Selection | None = None,
    found: Scan | None = None,
) -> list[tuple[str, ...]] | None:
    """Each file's captions, or None where no file has one and there is no default.

    found: the scan of root, where there is one. Problems are reported in one warning each; those
    of single images only where captions are used.
    """
    found = walk(root) if found is None else found
    selection = selection or Selection()
    table = read_tables(found, files, selection)
    beside = {}
    wrong = []
    problems = []
    ordered = sorted(found.texts, key=lambda p: (p.suffix != p.suffix.lower(), os.fsencode(p)))
    for spelled in (str, nfc):  # exact names go first
        for path in ordered:
            beside.setdefault((path.parent, spelled(path.stem), path.suffix.lower()), path)
    captions = []
    sources = Counter()
    some = False
    for file in files:
        texts = table.get(file, ())
        given = False
        source = "metadata"
        if not texts:
            names = dict.fromkeys((file.stem, nfc(file.stem), file.name, nfc(file.name)))
            sides = [
                beside[key]
                for name in names
                for suffix in TEXTS
                if (key := (file.parent, name, suffix)) in beside
            ]
            sides = list(dict.fromkeys(sides))
            text = _read_side(sides[0], root, wrong) if sides else None
            if len(sides) > 1:
                wrong.append((str(file), f"several texts; using {sides[0].name!r}"))
            given = text is not None
            texts = texts_of(text, str(file))
            source = "texts beside the images"
        some |= bool(texts) or given
        if texts:
            sources[source] += 1
        else:
            kind = "empty caption" if given else "no caption"
            problems.append((str(file), f"{kind}; using {default!r}"))
        captions.append(texts or (default,))
    if not selection.captions:
        wrong = []
        problems = []
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
    known = {(file.parent, nfc(name)) for file in files for name in (file.stem, file.name)}
    return [path for path in found.texts if (path.parent, nfc(path.stem)) not in known]


def nfc(name: str) -> str:
    """Compose a name's accents, which Macs write as characters of their own."""
    return unicodedata.normalize("NFC", name)


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
    except OSError as error:
        problems.append((str(side), f"{error.strerror or error}; not read"))
        return None
    except ValueError as error:
        problems.append((str(side), f"{error}; not read: save it as UTF-8"))
        return None
    if len(raw) > MOST_CAPTION:
        problems.append((str(side), f"more than {MOST_CAPTION:,} bytes; cut off there"))
    if encoding != "UTF-8":
        problems.append((str(side), f"not UTF-8; read as {encoding}"))
    return text


# --- tables --------------------------------------------------------------------------------------


def read_tables(found: Scan, files: list[Path], selection: Selection) -> dict[Path, tuple]:
    """{image: its captions} from the tables below a folder; says which rows match no image."""
    root = Path(os.path.abspath(found.root))
    wanted = selection.caption_column
    images = Images(found.images)
    names = (selection.image_column,) if selection.image_column else NAME_COLUMNS
    candidates = (wanted,) if wanted else CAPTION_COLUMNS
    used = set(files)
    captions = {}
    problems = []
    bad = []
    rows = 0
    elsewhere = 0
    seen = Counter()
    columns = {}
    for table in found.tables:
        if not inside(table, found.root):
            log(f"warning: {str(table)!r} leads out of the data folder and is not read")
            continue
        for where, row in _rows(table, names, columns, selection.captions):
            rows += 1
            try:
                name = _file_name(row, where, names)
                image = None if name is None else images.join(table.parent, name)
                column, texts = _caption(row, where, candidates) if image in used else (None, ())
            except UserError as error:
                if selection.captions:
                    raise
                bad.append((where, str(error).removeprefix(f"{where}: ")))
                continue
            if name is None:
                problems.append((where, "no file name"))
            elif image is None:
                problems.append((f"{where}: {name}", _why(table.parent, name, root, images)))
            elif image not in used:
                elsewhere += 1
            else:
                captions[image] = (*captions.get(image, ()), *texts)
                if column is not None:
                    seen[column] += 1
    if columns or selection.captions or not found.tables:  # else no table could be read
        for option in ("caption_column", "image_column"):
            if (name := getattr(selection, option)) and name not in columns:
                there = f"; there are {', '.join(columns)}" if columns else ""
                raise UserError(
                    f"--{option} {name}: no metadata.* of {found.root} has this column{there}"
                )
    if rows:
        sources = listed((f"column {name}", n) for name, n in seen.items())
        ignored = [c for c in CAPTION_COLUMNS if c in columns and c not in seen]
        more = f"; {', '.join(ignored)} not used" if ignored and seen else ""
        more += "" if seen else f"; the columns are {', '.join(columns)}"
        more += f"; {elsewhere:,} rows are of another split or class" if elsewhere else ""
        log(f"metadata: {rows:,} rows; captions from {sources or 'no column'}{more}")
    report("rows of metadata match no image", problems, rows)
    report("rows of metadata cannot be used", bad, rows)
    return {image: tuple(dict.fromkeys(texts)) for image, texts in captions.items()}


class Images:
    """Files by the names that tables give them."""

    def __init__(self, files: list[Path]):
        self.exact = {Path(os.path.abspath(file)): file for file in files}
        self.alike: dict[str, Path | None] = {}  # None: several, which only an exact name tells
        self.stems: dict[tuple[Path, str], str] = {}
        for path, file in self.exact.items():
            key = self._key(path)
            self.alike[key] = None if key in self.alike else file
            self.stems[path.parent, nfc(path.stem).lower()] = path.name

    @staticmethod
    def _key(path: Path) -> str:
        return nfc(os.path.join(path.parent, path.name.strip()))

    def join(self, folder: Path, name: str) -> Path | None:
        """The image of a table's row; \\ may stand for /, and accents may be written otherwise."""
        spellings = dict.fromkeys((name, name.replace("\\", "/"), name.strip()))
        paths = [Path(os.path.abspath(os.path.join(folder, spelled))) for spelled in spellings]
        found = next((self.exact[path] for path in paths if path in self.exact), None)
        keys = [self._key(path) for path in paths] if found is None else []
        return next((file for key in keys if (file := self.alike.get(key))), found)


def _rows(
    table: Path, names: tuple[str, ...], columns: dict, strict: bool
) -> Iterator[tuple[str, dict]]:
    """(place, row) of a table of images, whose columns are added to `columns`.

    A table of something else, or without rows, is warned of. Raises UserError for a damaged one,
    or warns of it if it need not be strict.
    """
    waiting = []
    named = False
    line = None
    try:
        for line, row in read_rows(table):
            columns.update(dict.fromkeys(map(str, row)))
            if not named and not (set(names) & row.keys()):
                waiting.append((f"{table}, line {line}", row))
                if table.suffix.lower() != ".jsonl" or len(waiting) == MOST_NAMELESS:
                    break
                continue
            yield from () if named else waiting
            named = True
            yield f"{table}, line {line}", row
    except UserError as error:
        if strict:
            raise
        log(f"warning: {error}; captions are not used here: no error")
        return
    if line is None:
        log(f"warning: {table} holds no rows")
    elif not named:
        there = shortened(", ".join(map(str, waiting[0][1])))
        log(
            f"warning: {table} has no column {' or '.join(names)} for the images' files and is not "
            f"used; its columns are {there}"
        )


def _file_name(row: dict, where: str, names: tuple[str, ...]) -> str | None:
    """The row's image; None where there is none. Raises UserError for what is no name."""
    key = next((name for name in names if name in row), None)
    value = None if key is None else row[key]
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {shortened(value)}; expected the name of a file")
    return value


def _caption(row: dict, where: str, columns: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """(column, captions) of a row: the first of the columns that holds any, else the first."""
    there = [column for column in columns if column in row]
    for column in there:
        if texts := texts_of(row[column], where):
            return column, texts
    return (there or [None])[0], ()


def _why(folder: Path, name: str, root: Path, images: Images) -> str:
    """Why a row matches no image."""
    path = Path(os.path.abspath(os.path.join(folder, name.replace("\\", "/"))))
    if not path.is_relative_to(root):
        return "lies outside the data folder"
    if "\0" not in name and os.path.isfile(path):
        if path.suffix.lower() not in SUFFIXES:
            return f"{path.suffix or 'no suffix'} is not read as an image"
        return "the image is left out"
    other = images.stems.get((path.parent, nfc(path.stem).lower()))
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
            yield plain_text(line)


def _json_rows(table: Path) -> Iterator[tuple[int, dict]]:
    number = 0
    lines = _lines(table, None)
    while True:
        number += 1
        try:
            line = next(lines, None)
            row = json.loads(line) if line and line.strip() else None
        except UserError:  # of the file
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{table}, line {number}: {error!s:.200}; expected a JSON object with "
                "file_name and text"
            ) from None
        if line is None:
            return
        if not line.strip():
            continue
        if not isinstance(row, dict):
            raise UserError(
                f"{table}, line {number}: {shortened(row)} is no JSON object with "
                "file_name and text"
            )
        yield number, row


def _csv_rows(table: Path) -> Iterator[tuple[int, dict]]:
    """Fields are separated by commas, by what stands in a header without any, or as sep= says."""
    lines = _lines(table, "")
    number = 1
    names = None
    try:
        header = next(lines, "")
        between = next((c for c in ",;\t" if c in header), ",")
        if said := re.fullmatch(r'"?sep=(.)"?\r?\n?', header, re.IGNORECASE):  # of Excel
            header = next(lines, "")
            number = 2
            between = said[1]
        before = number
        rows = csv.reader(
            chain([header], lines), delimiter=between, strict=True, skipinitialspace=True
        )
        for row in rows:
            if not row:
                pass
            elif names is None:
                names = [name.strip() for name in row]
                if len(set(names)) < len(names):
                    raise UserError(f"{table}: its header names a column twice: {shortened(row)}")
            elif len(row) != len(names):
                raise UserError(
                    f"{table}, line {number}: {len(row)} fields, {shortened(row)}; the "
                    f"header has {len(names)}: put a text with {between!r} in it "
                    "between quotes"
                )
            else:
                yield number, {n: _csv_value(value) for n, value in zip(names, row)}
            number = rows.line_num + before
    except UserError:
        raise
    except (csv.Error, ValueError) as error:
        raise UserError(f"{table}, line {number}: {error!s:.200}") from None


def _csv_value(text: str) -> str | list | None:
    """What a field stands for: null, a list of texts, or itself."""
    bare = text.strip()
    if bare in NULLS:
        return None
    if not (bare.startswith("[") and bare.endswith("]")):
        return text
    try:
        items = json.loads(bare)
    except (ValueError, RecursionError):
        items = _python_list(bare[1:-1].strip())
    ours = items is not None and all(item is None or isinstance(item, str) for item in items)
    return items if ours else text


def _python_list(text: str) -> list | None:
    """The texts and nulls between brackets; None for anything else."""
    items = []
    place = 0
    while place < len(text):
        if not (item := ITEM.match(text, place)):
            return None
        try:
            items.append(literal_eval(item[1]) if item[1][0] in "'\"" else None)
        except (ValueError, SyntaxError):
            return None
        place = item.end()
    return items


def _parquet_rows(table: Path) -> Iterator[tuple[int, dict]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(
            f"{table} needs the pyarrow library: pip install pyarrow (or datasets); or "
            "write it as metadata.jsonl"
        ) from None
    try:
        with parquet.ParquetFile(table) as file:
            number = 0
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, ValueError, RecursionError, MemoryError, ArrowException) as error:
        raise UserError(f"{table} cannot be read: {str(error).split(chr(10))[0]:.200}") from None
