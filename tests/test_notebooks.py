"""The notebooks of docs/notebooks: what is committed of them, and that they run."""

import ast
import importlib.util
import re

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs nbclient (tests/requirements.txt)")

FOLDER = ROOT / "docs" / "notebooks"
NAMES = ("quickstart", "lora_styles")
SHORT = {  # so short that nothing is learnt
    "quickstart": {"MODEL": "shipped", "CLASS_STEPS": 5},
    "lora_styles": {"FACES": 110, "VAE_STEPS": 4, "BASE_STEPS": 4, "STEPS": 3},
}


def read(name: str):
    return nbformat.read(FOLDER / f"{name}.ipynb", 4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def plain(source: str) -> str:
    """Python without a notebook's own commands."""
    return re.sub(r"(?m)^( *)%.*$", r"\1pass", source)


def words(name: str) -> str:
    return "\n".join(c.source for c in read(name).cells if c.cell_type == "markdown")


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_committed(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 1.5e6
    cells = code_cells(notebook)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c.outputs]
    assert {o.output_type for o in outputs} <= {"stream", "display_data", "execute_result"}
    assert not any(o.get("name") == "stderr" for o in outputs)  # progress bars
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 6
    assert [c.id for c in notebook.cells] == [f"cell-{i:02d}" for i in range(len(notebook.cells))]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_machine_is_in_them(name):
    notebook = read(name)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/png", None)
    text = nbformat.writes(notebook)
    assert not re.search(r"(?<![\w.])/(work|tmp|root|home|usr|opt|Users)\b|0x[0-9a-f]{6}", text)
    assert not re.search(r"\.local|site-packages|localhost", text)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cell_installs(name):
    first, second = code_cells(read(name))[:2]
    for line in ("REPOSITORY = ", "import diffusion", "%pip install -q git+{REPOSITORY}"):
        assert line in first.source
    assert second.metadata["tags"] == ["parameters"]
    for parameter in SHORT[name]:
        assert re.search(rf"(?m)^{parameter} = ", second.source)


@pytest.mark.parametrize("name", NAMES)
def test_the_code_uses_what_there_is(name):
    """All cells parse, imports of the package are found, and so are options of training."""
    from diffusion.config import DEFAULTS

    tree = ast.parse("\n".join(plain(cell.source) for cell in code_cells(read(name))))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("diffusion"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(inside), inside
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "diffusion":
            assert hasattr(importlib.import_module("diffusion"), node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "diffusion.train":
            assert {k.arg for k in node.keywords} <= {*DEFAULTS, "preset", None}


@pytest.mark.parametrize("name", NAMES)
def test_links_of_notebooks_lead_somewhere(name):
    from test_docs import anchors

    links = re.findall(r"\]\(([^)\s]+)\)", words(name))
    assert len(links) > 3
    for target in links:
        path, _, anchor = target.partition("#")
        file = (FOLDER / path).resolve()
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_they_run_in_a_fresh_kernel(name, tmp_path, monkeypatch):
    pytest.importorskip("nbclient", reason="needs nbclient (tests/requirements.txt)")
    pytest.importorskip("ipykernel", reason="needs ipykernel (tests/requirements.txt)")
    import notebooks

    for variable in ("PYTHONPATH", "IPYTHONDIR"):
        monkeypatch.setenv(variable, "")
    notebook = read(name)
    notebooks.with_parameters(notebook, SHORT[name])
    done = notebooks.execute(notebook, tmp_path)  # raises what a cell raises
    committed = code_cells(read(name))
    for cell, before in zip(code_cells(done), committed):
        pictures = [
            sum("image/png" in o.get("data", {}) for o in c.outputs) for c in (cell, before)
        ]
        assert pictures[0] == pictures[1]
