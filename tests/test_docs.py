"""What the documents promise and calculate is so."""

import ast
import functools
import re
from pathlib import Path

import pytest
from conftest import ROOT

P, F, R, U, B = 859_520_964, 0.803e12, 312e12, 0.35, 8
NETWORKS = {"NVLink": 200e9, "a card a GPU": 100e9, "a card a machine": 12.5e9}
CASES = [(8, "NVLink", 1), (64, "a card a GPU", 1), (64, "a card a machine", 1),
         (64, "a card a machine", 4), (512, "a card a GPU", 1), (512, "a card a machine", 1),
         (512, "a card a machine", 4)]  # fmt: skip


def row(N: int, network: str, k: int) -> str:
    """The formulas of docs/scale.md."""
    C = k * B * 3 * F / (U * R)
    X = 2 * (N - 1) / N * 4 * P / NETWORKS[network]
    S = C + max(0.0, X - 0.9 * 2 / 3 * C / k)
    return (f"| {N} | {network} | {k} | {1e3 * C:.0f} | {1e3 * X:.0f} | {1e3 * S:.0f} | "
            f"{100 * C / S:.0f} % | {N * k * B / S:,.0f} |")  # fmt: skip


def test_the_scaling_table_is_its_formulas():
    text = (ROOT / "docs" / "scale.md").read_text()
    table = [line for line in text.splitlines() if re.match(r"\| \d+ \| (NVLink|a card)", line)]
    assert table == [row(*case) for case in CASES]
    assert "a calculation, not a measurement" in text


def test_what_the_scaling_table_starts_from():
    """Parameters and FLOPs of Stable Diffusion 1.5's U-Net, counted on the network."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from diffusion.models.cond import Cond
    from diffusion.models.configs import UNetConfig
    from diffusion.models.sd_unet import SDUNet

    with torch.device("meta"):
        unet = SDUNet(UNetConfig())
        x, t = torch.empty(1, 4, 64, 64), torch.empty(1)
        text = Cond(context=torch.empty(1, 77, 768))
        with FlopCounterMode(display=False) as counter:
            unet(x, t, text)
    assert sum(p.numel() for p in unet.parameters()) == P
    assert counter.get_total_flops() == pytest.approx(F, rel=1e-3)


def test_the_table_of_faults_names_tests_that_exist():
    text = (ROOT / "docs" / "reliability.md").read_text()
    tests = {p.name: p.read_text() for p in (ROOT / "tests").glob("test_*.py")}
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`test_" in line]
    assert len(rows) >= 20
    for line in rows:
        for name in re.findall(r"`(test_\w+)`", line):
            assert any(f"def {name}(" in code for code in tests.values()), name
    for name in re.findall(r"tests/(test_\w+\.py)", text):
        assert name in tests, name


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "data/README.md"]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    """Pages, files of code, pictures and headings, all within the clone."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pictures_are_pictures_and_say_what_they_show(page):
    from PIL import Image

    for text, target in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", page.read_text()):
        assert text, target
        Image.open(page.parent / target).verify()


def test_every_page_and_every_picture_is_led_to():
    texts = {page: page.read_text() for page in PAGES}
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page, text in texts.items()
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
    }
    pages = {page for page in PAGES if page.parent == ROOT / "docs"}
    assert pages | set((ROOT / "docs/images").iterdir()) <= linked


@functools.cache
def defined() -> tuple[set[str], dict[str, set[str]]]:
    """(functions, classes and fields of the package, what each module and class has)."""
    names, members = set(), {"diffusion": {"load"}}
    for path in (ROOT / "diffusion").rglob("*.py"):
        tree = ast.parse(path.read_text())
        top = members.setdefault(path.stem, set())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            if not isinstance(node, ast.ClassDef | ast.Module):
                continue
            into = top if node is tree else members.setdefault(node.name, set())
            for child in node.body:
                into |= {getattr(child, "name", None)}
                targets = getattr(child, "targets", [getattr(child, "target", None)])
                into |= {t.id for t in targets if isinstance(t, ast.Name)}
    return names.union(*members.values()), members


# What is in backticks and looks like a name of the package, and is not one.
OTHERS = {
    "torch",
    "zipfile",
    "os",
    "PeftModel",
    "modelspec",
    "diffusion.sha256",
    "np",
    "Class",
    "module",
}
FORMULAS = {"abs", "max", "min", "sin", "cos", "sqrt", "log", "exp"}
SUFFIXES = (
    "py md json jsonl png txt pt ckpt safetensors caption html csv parquet yaml toml sh".split()
)
NAMED = [page for page in PAGES if page.name not in ("CHANGELOG.md", "log.md")]  # history


@pytest.mark.parametrize("page", NAMED, ids=lambda p: p.name)
def test_functions_and_classes_in_backticks_exist(page):
    names, members = defined()
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    for code in re.findall(r"`([^`\n]+)`", text):
        found = re.fullmatch(r"((?:\w+\.)*)([A-Za-z_]\w*)(\(.*\))?", code)
        if not found or not (found[1] or found[3]) or code in OTHERS:
            continue
        owner, name = found[1].rstrip(".").rpartition(".")[2], found[2]
        if owner in OTHERS or (owner and name in SUFFIXES) or code.endswith(".png.txt"):
            continue
        if owner:
            of_a_variable = owner.islower() and name in names  # codec.x0(batch)
            assert of_a_variable or name in members.get(owner, ()), code
        elif len(name) > 2 and name not in FORMULAS | OTHERS:  # f(x, t) is mathematics
            assert name in names, code


def test_the_tour_names_what_exists():
    """Files of the package are links, and functions and classes in backticks are defined."""
    text = (ROOT / "docs" / "tour.md").read_text()
    code = "\n".join(p.read_text() for p in (ROOT / "diffusion").rglob("*.py"))
    for shown, target in re.findall(r"\[([\w/]+\.py)\]\(([^)]+)\)", text):
        assert target.endswith(shown)
    named = re.findall(r"`(?:\w+\.)?(\w+)(?:\([^`]*\))?`", text)
    names = {n for n in named if re.search(r"[A-Z]|_[a-z]", n)} - {"x_t", "C", "H", "W", "B"}
    assert len(names) > 50
    for name in names:
        assert re.search(rf"(def|class) {name}\b|^ *{name}\b.* = ", code, re.M), name


def test_the_equations_name_functions_and_tests_that_exist():
    text = (ROOT / "docs" / "math.md").read_text()
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 90
    for name in named:
        assert f"def {name}(" in tests, name
    files = {p.stem: p.read_text() for p in (ROOT / "diffusion").rglob("*.py")}
    for module, name in re.findall(r"`([a-z_]+)\.(\w+)`", text):
        assert re.search(rf"^ *(def|class) {name}\b|^{name}\b", files[module], re.M), (module, name)
