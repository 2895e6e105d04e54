"""The walls of the house: who may import whom."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "diffusion"
FILES = sorted(PACKAGE.rglob("*.py"))
# a room imports from itself and from floors below; a room that stands on none fails
FLOORS = [
    {"__init__", "runtime"},
    {"presets", "names"},
    {"config"},
    {"process", "models"},
    {"files"},
    {"data"},
    {"sampling"},
    {"pictures"},
    {"evaluation"},
    {"training"},
    {"commands", "study", "export", "learn_table", "reproduce"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FOREIGN = {
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "lightning",
    "pytorch_lightning",
    "k_diffusion",
}
MAY_OPEN_FILES = {"data", "files", "pictures", "evaluation", "study"}


def room_of(path: Path) -> str:
    if path.relative_to(PACKAGE) == Path("process/names.py"):
        return "names"  # what options may be called, which --help reads without torch
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Absolute dotted names of everything a file imports, also inside functions."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(p for p in (base, node.module) if p)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: Path) -> set[str]:
    ours = [n for n in imports(path) if n.startswith("diffusion.")]
    own = "diffusion.process.names"
    return {"names" if n.startswith(own) else n.split(".")[1] for n in ours} & {
        *FLOOR,
        *(p.name for p in PACKAGE.iterdir() if p.is_dir()),
    }


def test_every_room_stands_on_a_floor():
    rooms = {room_of(path) for path in FILES}
    assert rooms == set(FLOOR), f"unknown or missing rooms: {sorted(rooms ^ set(FLOOR))}"


def test_no_file_name_twice():
    own = {"__init__.py", "__main__.py"}
    names = Counter(path.name for path in FILES if path.name not in own)
    assert not [name for name, count in names.items() if count > 1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_walls(path):
    room = room_of(path)
    text = path.read_text()
    names = imports(path)
    assert not {n.split(".")[0] for n in names} & FOREIGN
    ours = rooms_imported(path) - {room}
    if path != PACKAGE / "__init__.py":  # the face of the package opens upper rooms when asked
        higher = {n for n in ours if FLOOR[n] >= FLOOR[room]}
        assert not higher, f"{room} imports {higher}, which do not stand below it"
    if path.name != "distributed.py":
        assert not any(n.startswith("torch.distributed") for n in names)
    if path.name != "cuda_graph.py":
        assert "CUDAGraph" not in text
    if room in ("process", "models"):
        assert not names & {"pathlib", "os", "io", "json"} and "open(" not in text


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_opened_in_their_rooms(path):
    own = ("training/run_folder.py", "runtime/threads.py")  # the latter reads what Linux says
    if room_of(path) in MAY_OPEN_FILES or str(path.relative_to(PACKAGE)) in own:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            opens = called == "open" or called.split(".")[-1] in ("read_text", "write_text", "read_bytes", "write_bytes")  # fmt: skip
            assert not opens, f"{path.name}:{node.lineno} opens a file: {called}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_class_has_two_bases(path):
    """Composition, not inheritance: only torch's own classes are mixed with others."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and len(node.bases) > 1:
            assert any("nn." in ast.unparse(base) for base in node.bases), node.name


NO_TRITON = importlib.util.find_spec("triton") is None  # it comes with torch for CUDA only


def test_importing_does_nothing(tmp_path):
    """No file, folder, print or CUDA context comes from importing all modules."""
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in [*FILES, *ROOT.glob("*.py")]
        if p.name != "__init__.py" and not (NO_TRITON and p.name.startswith("triton_"))
    ]
    code = ("import sys, torch; before = torch.get_rng_state().clone(); sys.path.insert(0, sys.argv[1]); "
            f"[__import__(m) for m in {modules!r}]; "
            "assert torch.equal(before, torch.get_rng_state()); assert not torch.cuda.is_initialized()")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


# --- what is written --------------------------------------------------------------------------------

WRITES = {"write_text", "write_bytes", "touch", "symlink_to", "hardlink_to", "rename", "tofile", "extractall"}  # fmt: skip
WRITERS = {"os.open", "os.replace", "os.rename", "os.link", "os.symlink", "os.truncate", "shutil.copy",
           "shutil.copyfile", "shutil.copy2", "shutil.copytree", "shutil.move", "np.save", "np.savez",
           "np.savez_compressed", "np.lib.format.open_memmap", "torch.save", "save_file", "json.dump",
           "pickle.dump", "SummaryWriter", "urllib.request.urlretrieve"}  # fmt: skip
# (file, function): why it may write by itself. Everything else calls files/atomic.py.
OWN_WRITES = {
    # writers, which `atomic`, `write_new` or `write_free` call with a fresh file
    ("grid.py", "write_png"): "a picture",
    ("grid.py", "save_animation"): "a film",
    ("grid.py", "data_uri"): "in memory",
    ("page.py", "write_page"): "a page",
    ("tensors.py", "write_tensors"): "safetensors",
    ("checkpoint.py", "save"): "a checkpoint",
    ("checkpoint.py", "_link"): "model.pt",
    # names that are given or changed
    ("output.py", "publish"): "never over a file of somebody's",
    ("atomic.py", "create_whole"): "a file or folder that is complete",
}
# what others of them should use
OTHER_WRITES = {
    ("cache.py", "_write"): "a writer: a shard of numbers",
    ("classifier.py", "open_classifier"): "a writer: the study's classifier",
    ("archives.py", "download"): "a writer: an archive, or the Inception network",
    ("archives.py", "write"): "in the fresh folder of files.atomic.create_whole",
    ("archives.py", "_unpack"): "in the fresh folder of files.atomic.create_whole",
    ("child.py", "main"): "files.atomic.write_text",
    ("runner.py", "run_child"): "files.atomic.open_append",
    ("experiment.py", "note"): "files.atomic.append_text",
    ("styles.py", "training_folder"): "files.atomic.create_whole",
    ("reproduce.py", "main"): "a temporary folder, for runs whose number alone counts",
}


def written(path: Path) -> list[tuple[str, str]]:
    """(function, what it calls) of everything in a file that writes."""
    found = []

    def visit(node, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            last = called.split(".")[-1]
            given = [*node.args, *(k.value for k in node.keywords)]
            texts = [
                a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)
            ]
            opens = last == "open" and any(re.fullmatch(r"[rbt]*[wxa+][wxabt+]*", m) for m in texts)
            saves = last == "save" and called.startswith(("image", "first", "picture"))  # Pillow's
            method = last in WRITES and isinstance(node.func, ast.Attribute)
            maps = called == "np.memmap" and "r" not in texts
            if (
                opens
                or saves
                or maps
                or method
                or called in WRITERS
                or called.startswith("tempfile.")
            ):
                found.append((function, called))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(path.read_text()), "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_everything_is_written_by_one_file(path):
    """So that no link leads a write elsewhere, and a kill leaves no half file: files/atomic.py."""
    if path.name == "atomic.py":
        return
    for function, called in written(path):
        known = OWN_WRITES | OTHER_WRITES
        assert (path.name, function) in known, f"{path.name}, {function}: {called} writes"


def test_what_may_write_does():
    """No row of the list stands for what is gone."""
    there = {(path.name, function) for path in FILES for function, _ in written(path)}
    assert OWN_WRITES.keys() <= there
