"""The walls of the house: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "diffusion").rglob("*.py"), *ROOT.glob("*.py")])
ORDER = [{"presets", "rules", "seeding", "config", "distributed"}, {"process", "models"}, {"data", "weights"}, {"pipeline", "sizes"}, {"latent"}, {"adapters"}, {"assemble"}, {"export"},
         {"evaluation"}, {"training"}, {"study", "train", "sample", "visualize"}]  # fmt: skip
FOREIGN = {
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "lightning",
    "pytorch_lightning",
    "k_diffusion",
}


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "diffusion" else parts[0]


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


def level(name: str) -> int | None:
    return next((i for i, rooms in enumerate(ORDER) if name in rooms), None)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_walls(path):
    here, names = room(path), imports(path)
    ours = {n.split(".")[1] for n in names if n.startswith("diffusion.")}
    assert not {n.split(".")[0] for n in names} & FOREIGN
    assert not (here == "process" and "models" in ours) and not (
        here == "models" and "process" in ours
    )
    if here != "__init__":
        higher = {n for n in ours if level(n) is not None and level(n) > level(here)}
        assert not higher, f"{here} imports {higher}, which stand above it"
    if path.name != "distributed.py":
        assert not any(n.startswith("torch.distributed") for n in names)
    if path.name != "graph.py":
        assert "CUDAGraph" not in path.read_text()
    if here in ("process", "models"):
        assert not names & {"pathlib", "os", "io", "json"} and "open(" not in path.read_text()


def test_importing_does_nothing(tmp_path):
    """No file, folder, print or CUDA context comes from importing all modules."""
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in FILES
        if p.name != "__init__.py"
    ]
    code = ("import sys, torch; before = torch.get_rng_state().clone(); sys.path.insert(0, sys.argv[1]); "
            f"[__import__(m) for m in {modules!r}]; "
            "assert torch.equal(before, torch.get_rng_state()); assert not torch.cuda.is_initialized()")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []
