"""Rows of tables that people write: .jsonl, .csv and .parquet, of any size.

A .csv has texts only. As pandas writes and reads it, NULLS are null, and "['a cat', 'a dog']" is a
list.
"""

import contextlib
import csv
import json
from ast import literal_eval
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from .. import UserError, shown
from ..files.atomic import blame, open_regular
from ..files.text_files import open_text, plain_text
from ..runtime.distributed import log

MAX_LINE = 1 << 20  # characters
# what pandas.read_csv takes for missing values, and with it Hugging Face's ImageFolder
NULLS = set(
    "|#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan"
    "|null".split("|")
)


def read_rows(table: Path) -> Iterator[tuple[str, dict]]:
    """Read (where it ends, row) after row. Raises UserError that names the line that is damaged."""
    suffix = table.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(table)
        return
    file, encoding = open_text(table)
    if encoding != "UTF-8":
        log(f"{table}: not UTF-8; read as {encoding}")
    number = 0

    def lines():
        nonlocal number
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE:
                raise ValueError(f"more than {MAX_LINE:,} characters")
            yield plain_text(line)

    with file:
        try:
            for row in (_json_rows if suffix == ".jsonl" else _csv_rows)(lines()):
                yield f"{table}, line {number}", row
        except (csv.Error, ValueError, RecursionError) as error:
            raise UserError(f"{table}, line {number}: {error!s:.300}") from None


def _json_rows(lines: Iterator[str]) -> Iterator[dict]:
    for line in filter(str.strip, lines):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"{shown(row)} is no JSON object with file_name and text")
        yield row


def _csv_rows(lines: Iterator[str]) -> Iterator[dict]:
    """Separate fields by commas, or by what stands in a header without any."""
    header = next(lines, "")
    between = next((c for c in ",;\t" if c in header), ",")
    lines = chain([header], lines)
    rows = filter(None, csv.reader(lines, delimiter=between, strict=True, skipinitialspace=True))
    names = [name.strip() for name in next(rows, [])]
    if len(set(names)) < len(names):
        raise ValueError(f"the header names a column twice: {shown(names)}")
    for row in rows:
        if len(row) != len(names):
            raise ValueError(
                f"{len(row)} fields, {shown(row)}; the header has {len(names)}: put a text "
                f"with {between!r} in it between quotes"
            )
        yield dict(zip(names, map(_csv_value, row)))


def _csv_value(text: str) -> str | list | None:
    """Read a field as null, a list of texts, or itself."""
    bare = text.strip()
    if bare in NULLS:
        return None
    for parse in (json.loads, _python_list) if bare[0] + bare[-1] == "[]" else ():
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            items = parse(bare)
            if all(item is None or isinstance(item, str) for item in items):
                return items
    return text


def _python_list(text: str) -> list:
    """Read a list as Python writes it; texts without a comma between would become one."""
    items = literal_eval(text)
    if repr(items).replace(" ", "") != text.replace(" ", ""):
        raise ValueError("no list as Python writes it")
    return items


def _parquet_rows(table: Path) -> Iterator[tuple[str, dict]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{table} needs the pyarrow library: pip install pyarrow (or datasets); or "
            "write it as metadata.jsonl"
        ) from None
    # the library raises nearly everything on damaged files
    with blame(f"{table} cannot be read"), open_regular(table) as source:
        with parquet.ParquetFile(source) as file:
            rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"{table}, line {number}", row
