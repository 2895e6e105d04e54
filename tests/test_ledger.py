"""The ledger: every number in a generated table has a row, and rows can be run again."""

import functools
import json
import operator
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from diffusion import UserError, reproduce
from diffusion.config import Parser, add_config_arguments, config_from_args

sys.path.insert(0, str(ROOT / "benchmarks"))
import ledger  # noqa: E402

ROWS = [json.loads(line) for line in reproduce.LEDGER.read_text().splitlines()]
BY_NAME = {row["name"]: row for row in ROWS}
ALWAYS = {"name", "about", "unit", "seeds", "values", "commit", "date", "machine", "torch", "path", "tolerance"}  # fmt: skip


def test_names_are_unique_and_the_promised_rows_exist():
    assert len(BY_NAME) == len(ROWS)
    assert {"toy", "toy_vae", "sd_tiny", "cats", "study"} <= set(BY_NAME)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_a_row_is_complete(row):
    assert row.keys() >= ALWAYS
    assert row["values"] and len(row["values"]) == len(row["seeds"])
    assert re.fullmatch(r"[0-9a-f]{7,}", row["commit"]), "measured on code that is not committed"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]) and row["machine"]
    assert "commands" in row or "raw" in row
    text = json.dumps(row.get("commands", []))
    for name in ("data", "features"):
        assert (f"{{{name}}}" in text) == (name in row)
        assert name not in row or (len(row[name]["digest"]) == 32 and row[name]["get"])
    assert "/tmp" not in text and "/home" not in text and "/work" not in text  # only the clone
    if len(row["seeds"]) > 1:
        assert "{seed}" in text
    if "curve" in row:
        assert [len(curve) for curve in row["curve"]["losses"]] == [
            min(50, int(value_of(row["commands"][0], "--train_steps"))) for _ in row["seeds"]
        ]


def value_of(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


@pytest.mark.parametrize(
    "row", [row for row in ROWS if "commands" in row], ids=lambda row: row["name"]
)
def test_commands_are_what_the_programs_take(row):
    given = {"seed": 1, "out": "out", "data": "data", "features": "features"}
    for command in row["commands"]:
        command = [part.format(**given) for part in command]
        assert command[0] == "-m" or (ROOT / command[0]).is_file()
        if command[0] == "train.py":
            parser = Parser()
            parser.add_argument("--preset")
            add_config_arguments(parser)
            values = vars(parser.parse_args(command[1:]))
            config = config_from_args(values, values.pop("preset"))
            assert config.device == "cpu" and config.amp != "auto"  # which depends on the CPU
            assert "curve" not in row or (config.amp == "no" and config.log_every == 1)


@pytest.mark.parametrize("row", [row for row in ROWS if "raw" in row], ids=lambda row: row["name"])
def test_a_row_of_a_raw_file_is_what_the_file_says(row):
    content = json.loads((ROOT / row["raw"]).read_text())
    at = lambda path: functools.reduce(operator.getitem, path, content)
    assert row["values"] == [at(row["path"])]
    assert row["date"] in row["raw"] and row["commit"] == content.get("commit", row["commit"])
    if "sides" in row:
        ours, others = row["compared"]
        assert [ours, others] == [at(side) for side in row["sides"]]
        ratio = others / ours if row["of"] in ("s", "ms") else ours / others
        assert row["values"][0] == pytest.approx(ratio)


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ledger.PAGES, ids=lambda page: page.name)
def test_tables_are_the_ledgers(page):
    """Not edited by hand, and each number has a row: `python benchmarks/ledger.py` writes them."""
    text = page.read_text()
    assert text.count("<!-- ledger: ") == len(ledger.MARKED.findall(text))
    assert ledger.filled(text, BY_NAME) == text


def test_every_row_is_in_a_table():
    found = [ledger.MARKED.findall(page.read_text()) for page in ledger.PAGES]
    names = [names for tables in found for _, names, _ in tables]
    assert {row["name"] for each in names for row in ledger.chosen(each, BY_NAME)} == set(BY_NAME)


def test_an_edited_number_is_found():
    page = "<!-- ledger: a b -->\n| old |\n<!-- end -->\nother 7\n"
    row = dict(about="this", unit="s", date="2026-01-02", machine="M", torch="2.6")
    rows = {name: row | dict(name=name, values=[value]) for name, value in (("a", 1234.56), ("b", 0.12345))}  # fmt: skip
    good = ledger.filled(page, rows)
    assert "| this (`a`) | 1,235 s | | 2026-01-02, M, torch 2.6 |" in good and "0.1235 s" in good
    assert good.endswith("<!-- end -->\nother 7\n") and ledger.filled(good, rows) == good
    edited = good.replace("1,235", "1,135")
    assert edited != good and ledger.filled(edited, rows) == good
    with pytest.raises(KeyError):
        ledger.filled(good, {"a": rows["a"]})


def test_rows_with_lines_and_columns_are_a_grid():
    cells = [("x", "p", 1.0), ("x", "q", 12345.0), ("y", "q", 0.5)]
    rows = {f"{a}_{b}": dict(line=a, column=b, values=[value]) for a, b, value in cells}
    page = "<!-- ledger: * -->\n<!-- end -->"
    table = "| | p | q |\n| --- | --- | --- |\n| x | 1 | 12,340 |\n| y | | 0.5 |\n"
    assert ledger.filled(page, rows) == page.replace("\n", "\n" + table)


# --- running -------------------------------------------------------------------------------------

TRAINS = """
import json, os, sys, time
seed, out, wait = float(sys.argv[1]), sys.argv[2], float(sys.argv[3])
os.makedirs(out, exist_ok=True)
with open(out + "/metrics.jsonl", "w") as file:
    for step in range(1, 18):
        print(json.dumps({"step": step, "loss": seed / step}), file=file, flush=True)
    time.sleep(wait)
    print(json.dumps({"step": 18, "heldout_loss": seed / 9}), file=file)
print("noise")
print(json.dumps({"threads": int(os.environ["OMP_NUM_THREADS"]), "deep": [{"x": seed}]}))
"""


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run the program on a ledger of one row, `call(row, *arguments)`: (status, what it printed)."""
    (tmp_path / "trains.py").write_text(TRAINS)

    def call(more: dict, *arguments, wait: float = 0):
        row = dict(name="r", about="a loss", unit="", seeds=[1, 2], values=[1 / 9, 2 / 9], threads=3,
                   file="metrics.jsonl", path=[-1, "heldout_loss"], tolerance=1e-4, machine="M", torch="2")  # fmt: skip
        row["commands"] = [[str(tmp_path / "trains.py"), "{seed}", "{out}", str(wait)]]
        row["curve"] = dict(file="metrics.jsonl", losses=[[1 / n for n in range(1, 18)]] * 2)
        file = tmp_path / "ledger.jsonl"
        file.write_text(json.dumps(row | more) + "\n")
        monkeypatch.setattr(reproduce, "LEDGER", file)
        monkeypatch.setattr(sys, "argv", ["reproduce", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            reproduce.main()
        return int(end.value.code), capsys.readouterr().out

    return call


def test_a_row_comes_back(call, tmp_path):
    status, said = call({}, "r", "--save_folder", tmp_path / "runs")
    assert status == 0 and "bit for bit" in said
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["1", "2"]
    status, said = call({"values": [1 / 9 * (1 + 9e-5), 2 / 9]}, "r")
    assert status == 0 and "bit for bit" not in said
    # each seed is off, their mean is not
    assert call({"values": [2 / 9, 1 / 9]}, "r")[0] == 0
    status, said = call({"values": [1 / 9 + 0.2, 2 / 9 + 0.2]}, "r")
    assert status == 1 and "OUTSIDE" in said


def test_a_number_of_the_last_line(call):
    row = {"file": None, "path": ["deep", 0, "x"], "values": [1.0, 2.0]}
    assert call(row, "r")[0] == 0
    assert call(row | {"path": ["threads"], "values": [3.0, 3.0]}, "r")[0] == 0


def test_the_first_steps_are_compared(call, tmp_path):
    """The run is not waited for, and nothing but the losses counts."""
    status, said = call({"values": [5.0, 5.0]}, "--check", wait=600)
    assert status == 0 and "as in the ledger" in said
    losses = [1 / n for n in range(1, 18)]
    losses[14] *= 1 + 2e-4  # the last one that is compared
    wrong = {"curve": dict(file="metrics.jsonl", losses=[losses])}
    assert call(wrong, "r", "--check", wait=600)[0] == 1
    with pytest.raises(UserError, match="15 steps"):
        call({"curve": dict(file="none.jsonl", losses=[losses])}, "--check")


def test_data_are_those_of_the_row(call, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"abc")
    digest = reproduce.digest_of(tmp_path / "data")
    row = {"data": {"digest": digest, "get": "from there"}}
    for arguments in (["r"], ["r", "--check"]):
        with pytest.raises(UserError, match="from there"):
            call(row, *arguments)
    assert call(row, "r", "--data", tmp_path / "data")[0] == 0
    assert call(row, "r", "--check", "--data", tmp_path / "data")[0] == 0
    status, said = call(row, "--check")
    assert status == 0 and "not checked" in said
    with pytest.raises(UserError, match="has no data"):
        call({}, "r", "--data", tmp_path / "data")
    for change in (lambda file: file.write_bytes(b"abd"), lambda file: file.rename(file.with_name("b.png"))):  # fmt: skip
        change(tmp_path / "data" / "a.png")
        assert reproduce.digest_of(tmp_path / "data") != digest
        with pytest.raises(UserError, match="digest"):
            call(row, "r", "--data", tmp_path / "data")
        (tmp_path / "data" / "a.png").write_bytes(b"abc")


def test_what_cannot_run_is_refused(call):
    with pytest.raises(UserError, match="no row"):
        call({}, "other")
    with pytest.raises(UserError, match="--save_folder"):
        call({}, "--save_folder", "x")
    with pytest.raises(UserError, match="status"):
        call({"commands": [["-c", "raise SystemExit(3)"]]}, "r")
    status, said = call({})
    assert status == 0 and "r: 0.1667 (0.1111 to 0.2222)" in said


@pytest.mark.slow
def test_the_first_steps_come_back():
    command = [sys.executable, "-m", "diffusion.reproduce", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
