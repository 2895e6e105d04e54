"""What the documents promise and calculate is so."""

import re

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

    from diffusion.models.configs import UNetConfig
    from diffusion.models.sd_unet import SDUNet

    with torch.device("meta"):
        unet = SDUNet(UNetConfig())
        x, t, text = torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)
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
