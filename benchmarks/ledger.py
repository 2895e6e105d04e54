#!/usr/bin/env python3
"""Write docs/ledger.jsonl and the tables that come from it.

python benchmarks/ledger.py NAME [--data PATH] [--features FILE]   measures a row, then the tables
python benchmarks/ledger.py                                        the tables alone

A new row is written into the ledger by hand, with its commands and seeds and without values (what a
row holds: diffusion/reproduce.py; `line` and `column` make a grid). Whatever is measured is put there by this program. In a page a table
stands between <!-- ledger: NAMES --> and <!-- end -->.
"""

import argparse
import datetime
import fnmatch
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

import common
import torch

sys.path.insert(0, str(common.ROOT))

from diffusion import reproduce  # noqa: E402

PAGES = [common.ROOT / "README.md", *sorted(common.ROOT.glob("docs/*.md"))]
MARKED = re.compile(r"(<!-- ledger: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
CURVE = 50  # losses that a row keeps


def commit() -> str:
    """The last commit that changed what a run consists of; -dirty if something has since."""
    code = [
        "--",
        "train.py",
        "sample.py",
        "diffusion",
        "benchmarks",
        ":!*/reproduce.py",
        ":!*/ledger.py",
    ]
    git = lambda *given: subprocess.run(["git", *given, *code], cwd=common.ROOT, capture_output=True, text=True).stdout.strip()  # noqa: E731  # fmt: skip
    return git("log", "-1", "--format=%h") + ("-dirty" if git("diff", "--stat", "HEAD") else "")


def number(value: float) -> str:
    """Four digits."""
    return format(float(f"{value:.4g}"), ",.15g")


def markdown(lines: list[list[str]]) -> str:
    return "".join(
        "|" + "".join(f" {cell} |" if cell else " |" for cell in line) + "\n" for line in lines
    )


def grid(rows: list[dict]) -> str:
    """Rows that say in which line and column of a table they stand."""
    columns = dict.fromkeys(row["column"] for row in rows)
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    for line in dict.fromkeys(row["line"] for row in rows):
        found = {row["column"]: number(mean(row["values"])) for row in rows if row["line"] == line}
        lines.append([line, *(found.get(column, "") for column in columns)])
    return markdown(lines)


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table: of ratios if they have sides."""
    if "line" in rows[0]:
        return grid(rows)
    lines = [["", "value", "each seed", "measured"], ["---"] * 4]
    if "sides" in rows[0]:
        lines[0] = ["", "ours", "others", "faster by"]
    for row in rows:
        value = number(mean(row["values"]))
        if "sides" in row:
            cells = [f"{number(side)} {row['of']}" for side in row["compared"]] + [value]
        else:
            seeds = ", ".join(map(number, row["values"])) if len(row["values"]) > 1 else ""
            when = f"{row['date']}, {row['machine']}, torch {row['torch']}"
            cells = [f"{value} {row['unit']}".strip(), seeds, when]
        lines.append([f"{row['about']} (`{row['name']}`)", *cells])
    return markdown(lines)


def chosen(names: str, rows: dict[str, dict]) -> list[dict]:
    """The rows of a mark, whose names may have *. Raises KeyError for a name that is no row."""
    found = []
    for pattern in names.split():
        if not (matched := fnmatch.filter(rows, pattern)):
            raise KeyError(pattern)
        found += [rows[name] for name in matched]
    return found


def filled(text: str, rows: dict[str, dict]) -> str:
    """A page's text with the tables that the rows make."""
    return MARKED.sub(lambda found: found[1] + table(chosen(found[2], rows)) + found[3], text)


def measure(row: dict, args) -> None:
    """Run a row with all its seeds and put into it what came out."""
    for name in ("data", "features"):
        if name in row:
            row[name]["digest"] = reproduce.digest_of(Path(getattr(args, name)))
    given = reproduce.places(row, args)
    values, curves = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in row["seeds"]:
            out = Path(args.save_folder or folder).resolve() / str(seed)
            found = reproduce.measure(row, given | {"seed": seed, "out": out})
            values.append(reproduce.number_at(found, row["path"]))
            if "curve" in row:
                curves.append(reproduce.losses(row, out)[:CURVE])
    row |= dict(values=values, commit=commit(), date=str(datetime.date.today()))
    row |= dict(machine=reproduce.machine(), torch=torch.__version__)
    row.pop("raw", None)  # of an earlier measurement
    if "sides" in row:
        row["compared"] = [reproduce.number_at(found, side) for side in row["sides"]]
    if "curve" in row:
        row["curve"]["losses"] = curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("name", nargs="?")
    parser.add_argument("--data")
    parser.add_argument("--features")
    parser.add_argument("--save_folder")
    args = parser.parse_args()
    if args.name:
        row = reproduce.read_ledger()[args.name]
        measure(row, args)
        rows = reproduce.read_ledger() | {args.name: row}  # others may have been measured meanwhile
        reproduce.LEDGER.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
        )
    rows = reproduce.read_ledger()
    for page in PAGES:
        text = page.read_text()
        if (new := filled(text, rows)) != text:
            page.write_text(new)
            print(page)


if __name__ == "__main__":
    main()
