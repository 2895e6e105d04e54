"""Execute a notebook of docs/notebooks in a fresh kernel: for the tests, and for its outputs.

python tests/notebooks.py docs/notebooks/quickstart.ipynb     # anew, with outputs to be committed
python tests/notebooks.py docs/notebooks/quickstart.ipynb MODEL='"train"' OUT.ipynb
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def with_parameters(notebook, parameters: dict) -> None:
    """Change values in the cell that is tagged "parameters", as papermill does."""
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    for name, value in parameters.items():
        line = f"{name} = {value!r}"
        cell.source, count = re.subn(rf"(?m)^{name} = .*$", lambda _: line, cell.source)
        assert count == 1, f"{name} is no parameter"


def execute(notebook, folder: Path, timeout: int = 1200):
    """Execute a notebook in a folder, with the package of this clone, and return it."""
    from nbclient import NotebookClient

    # a kernel inherits the environment; history and profiles are no user's
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["IPYTHONDIR"] = str(folder / ".ipython")
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=timeout, resources=resources).execute()


def joined(outputs: list) -> list:
    """Make one output of lines that were printed one after the other."""
    found = []
    for output in outputs:
        if found and output.output_type == found[-1].output_type == "stream":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def clean(notebook) -> None:
    """Leave of the outputs what a reader wants: no progress bars, no times."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = joined([o for o in cell.outputs if o.get("name") != "stderr"])
            for output in cell.outputs:
                # what objects are in text holds addresses; there is a picture of them
                if "image/png" in output.get("data", {}):
                    output.data["text/plain"] = "<picture>"
                    output.data.pop("image/jpeg", None)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def main(source: str, *rest: str) -> None:
    target = next((r for r in rest if "=" not in r), source)
    notebook = nbformat.read(source, 4)
    pairs = (r.split("=", 1) for r in rest if "=" in r)
    with_parameters(notebook, {name: eval(value) for name, value in pairs})
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = execute(notebook, Path(folder))
    clean(done)
    nbformat.write(done, target)
    print(f"{target}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
