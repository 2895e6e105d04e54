"""Run again what the numbers in README.md and docs were measured by.

python -m diffusion.reproduce                   list the rows of docs/ledger.jsonl
python -m diffusion.reproduce toy               run one: its value, the ledger's, and a verdict
python -m diffusion.reproduce cats --data PATH  one whose images are not in the clone
python -m diffusion.reproduce --check           the first steps of what trains, in a minute

The order of the images, the timesteps and the noise are functions of the seed, on every machine.
What depends on the machine is rounding: of sums (the kind of CPU, the number of threads, torch's
version), and of all else where --amp is not no. Seconds and ratios of them are the machine's own.
"""

# A row of the ledger is a JSON object on a line, for one number.
#   name, about, unit, seeds, commit, date, machine, torch; values: one for each seed
#   commands: lists of arguments for Python, run in the clone one after another, where {seed},
#     {out}, {data} and {features} stand for a seed, its folder, and what the user gives
#   threads: of each command
#   file: what then holds the number, a pattern in {out}; null: the last line that was printed
#   path: the keys that lead to the number there
#   sides: of a ratio, the paths of what it compares; compared: these two numbers; of: their unit
#   raw: the dated file of benchmarks/results that the number comes from, in place of a run here;
#     a row that nobody can run again has no commands
#   data, features: {digest, get}
#   curve: of a run's losses, {file, losses: the first ones of each seed}
#   tolerance: the relative difference that another machine may make

import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch

from . import UserError
from .config import Parser, Rule, run_script
from .files.atomic import open_regular, read_lines
from .files.text_files import parse_json, read_json, read_text_file
from .runtime.distributed import log

ROOT = Path(__file__).parents[1]
LEDGER = ROOT / "docs" / "ledger.jsonl"
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # which decide how a CPU computes
STEPS = 15  # that --check trains: enough for the loss to fall
CLOSE = 1e-4  # relative difference of their losses
RUN = Rule("NAME without --check", lambda args: args.name and not args.check)
ANY = Rule("NAME or --check", lambda args: args.name or args.check)


def read_ledger() -> dict[str, dict]:
    """Read the rows by name, in order. Raises UserError if the ledger is missing or damaged."""
    if not LEDGER.is_file():
        raise UserError(f"{LEDGER} is missing: run this in a clone, which has the programs, too")
    rows = [parse_json(line, LEDGER) for line in read_text_file(LEDGER)[0].splitlines()]
    return {row["name"]: row for row in rows}


def number_at(content, path: list) -> float:
    """Follow keys and indices to a number."""
    for key in path:
        content = content[key]
    return float(content)


def shown_values(row: dict, values: list[float]) -> str:
    """Show mean and range, and of what."""
    value = f"{mean(values):.4g} {row['unit']}".strip()
    return f"{row['name']}: {value} ({min(values):.4g} to {max(values):.4g}), {row['about']}"


def deviation(found: list[float], known: list[float]) -> float:
    """Return the largest relative difference."""
    return max(abs(value / old - 1) for value, old in zip(found, known))


def verdict(row: dict, values: list[float]) -> tuple[bool, str]:
    """Compare values with the ledger's of the same seeds: (whether they agree, in words)."""
    known = row["values"]
    error = deviation(values, known)
    apart = f"{error:.1e} apart, of which {row['tolerance']:g} may be the machine's"
    if error <= row["tolerance"]:
        return True, f"the same, {apart}" if error else "the same, bit for bit"
    within = min(known) <= mean(values) <= max(known)
    return within, f"{'within' if within else 'OUTSIDE'} the spread of the seeds, {apart}"


def machine() -> str:
    """Name the CPU and the instructions that matter, as far as Linux says."""
    file = Path("/proc/cpuinfo")
    text = read_text_file(file)[0] if file.exists() else ""
    model = re.findall(r"model name\s*: (.+)", text)[:1] or [platform.machine()]
    return ", ".join(model + [name for name in FEATURES if name in text.split()])


def digest_of(path: Path) -> str:
    """Digest a file, or names and contents of all files in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = hashlib.sha256()
    for file in filter(Path.is_file, files):
        with open_regular(file) as opened:
            found.update(file.relative_to(path).as_posix().encode() + b"\0")
            found.update(hashlib.sha256(opened.read()).digest())
    return found.hexdigest()[:32]


def places(row: dict, args) -> dict:
    """Find what a row reads beside the clone. Raises UserError for anything else."""
    found = {}
    for name in ("data", "features"):
        given = getattr(args, name)
        if name not in row:
            if given and args.name:
                raise UserError(f"--{name} does nothing: {args.name} has no {name} of its own")
            continue
        what = f"{row['name']} needs --{name}: {row[name]['get']}"
        if given is None:
            raise UserError(what)
        found[name] = Path(given).resolve()
        if (digest := digest_of(found[name])) != row[name]["digest"]:
            raise UserError(f"{given}: digest {digest}, not {row[name]['digest']}; {what}")
    return found


def start(row: dict, command: list[str], given: dict, stdout: int) -> subprocess.Popen:
    command = [part.format(**given) for part in command]
    log(f"$ python {' '.join(command)}")
    env = os.environ | {"OMP_NUM_THREADS": str(row["threads"])}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=stdout, text=True)


def measure(row: dict, given: dict):
    """Run a row with one seed; return what holds its number. Raises UserError if it fails."""
    for command in row["commands"]:
        with start(row, command, given, subprocess.PIPE) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
        if process.returncode:
            raise UserError(f"{command[0]} ended with status {process.returncode}, see above")
    if row["file"] is None:
        return parse_json(line, "the last line")
    file = next(given["out"].glob(row["file"]))
    return read_lines(file) if file.suffix == ".jsonl" else read_json(file)


def losses(row: dict, out: Path) -> list[float]:
    return [line["loss"] for line in read_lines(out / row["curve"]["file"]) if "loss" in line]


def check(row: dict, given: dict) -> bool:
    """Train the first steps of a row's first seed; tell whether their losses are the ledger's."""
    with start(row, row["commands"][0], given, subprocess.DEVNULL) as process:
        while process.poll() is None and len(losses(row, given["out"])) < STEPS:
            time.sleep(0.1)
        process.kill()
    found = losses(row, given["out"])[:STEPS]
    if len(found) < STEPS:
        raise UserError(f"{row['name']} ended after {len(found)} of {STEPS} steps, see above")
    error = deviation(found, row["curve"]["losses"][0])
    good = error <= CLOSE
    log(
        f"{row['name']}: {'as' if good else 'NOT as'} in the ledger, {error:.1e} apart "
        f"({CLOSE:g} is allowed)"
    )
    return good


def reproduce(row: dict, args, root: Path) -> bool:
    """Run a row with each of its seeds, below root; tell whether the ledger's values come back."""
    given = places(row, args)
    if args.check:
        return check(row, given | {"seed": row["seeds"][0], "out": root})
    values = []
    for seed in row["seeds"]:
        found = measure(row, given | {"seed": seed, "out": root / str(seed)})
        values.append(number_at(found, row["path"]))
        log(f"{row['name']}, seed {seed}: {values[-1]}")
    good, words = verdict(row, values)
    log(f"here:   {values} on {machine()}, torch {torch.__version__}")
    log(f"ledger: {row['values']} on {row['machine']}, torch {row['torch']}")
    log(f"{shown_values(row, values)}: {words}")
    return good


def main() -> None:
    parser = Parser(prog="python -m diffusion.reproduce", description=__doc__)
    # fmt: off
    parser.add_argument("name", nargs="?", metavar="NAME", help="row to run (default: all are listed)")
    parser.option("--check", f"train only the first {STEPS} steps of NAME, or of every row that can, and compare the losses")
    parser.option("--data PATH", "images that are not in the clone; the row says how to get them", requires=ANY)
    parser.option("--features FILE", "weights of a row's feature network, likewise", requires=RUN)
    parser.option("--save_folder FOLDER", "folder of the runs (default: a temporary one)", requires=RUN)
    # fmt: on
    args = parser.parse_args()
    parser.check(args)
    rows = read_ledger()
    if args.name not in (None, *rows):
        raise UserError(f"{args.name!r} is no row; there are {', '.join(rows)}")
    needed = "curve" if args.check else "commands"
    good = True
    for name in [args.name] if args.name else rows:
        row = rows[name]
        if not args.name and not args.check:
            log(f"{shown_values(row, row['values'])}, {row['machine']}")
        elif needed not in row:
            if args.name:
                raise UserError(f"{name} has no {needed}: {row.get('raw', 'run it whole')}")
        elif not args.name and "data" in row and not args.data:
            log(f"{name}: not checked without --data")
        else:
            with tempfile.TemporaryDirectory() as folder:
                good &= reproduce(row, args, Path(args.save_folder or folder).resolve())
    sys.exit(not good)


if __name__ == "__main__":
    run_script(main)
