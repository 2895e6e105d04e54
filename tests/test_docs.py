"""What the documents promise and calculate is so."""

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
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


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
