#!/usr/bin/env python3
"""Draw docs/images/figure.png, the README's figure: a sampler's table above what its rows make.

python benchmarks/figure.py        with the model that comes with the package; needs chromium

Everything in it is computed: the numbers are the table's, the pictures are of the loop that runs it.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import torch

sys.path.insert(0, str(common.ROOT))

from PIL import Image  # noqa: E402

import diffusion  # noqa: E402
from diffusion.pictures.grid import data_uri, grid, to_uint8  # noqa: E402
from diffusion.process.samplers import D0, NOISE, X  # noqa: E402
from diffusion.sampling.load import SHIPPED  # noqa: E402

STEPS = 8
FACES = [3, 6]  # of seed 0
COLUMNS = (("x", X), ("x&#770;<sub>0</sub>", D0), ("history", D0 + 1), ("noise", NOISE))
PAGE = """<!doctype html><meta charset="utf-8"><style>
 body {{ margin: 0; width: 1200px; background: #fff; color: #1f2328; font: 15px/1.35 "DejaVu Sans", sans-serif; }}
 main {{ display: flex; gap: 26px; padding: 20px 24px; align-items: stretch; }}
 table {{ border-collapse: collapse; }}
 td, th {{ padding: 0 3px; text-align: center; font-weight: normal; }}
 th.name {{ text-align: right; padding-right: 10px; color: #59636e; white-space: nowrap; font-size: 14px; }}
 td.k {{ font: 13px "DejaVu Sans Mono", monospace; height: 22px; border-radius: 4px; }}
 img.x {{ width: 74px; height: 74px; image-rendering: pixelated; display: block; margin: 2px auto; border-radius: 4px; }}
 .formula {{ font: italic 24px "DejaVu Serif", serif; padding: 4px 0 12px; }}
 .formula sub {{ font-size: 15px; }} .formula small {{ font: 14px "DejaVu Sans"; color: #59636e; padding-left: 14px; }}
 .faces img {{ height: 454px; image-rendering: pixelated; border-radius: 6px; }}
 .gap td {{ height: 8px; }}
</style><main><div>
<div class="formula">x<sub>s</sub> = k · (x, x&#770;<sub>0</sub>, history, noise)
<small>a sampler is a table: a row k for each call of the network</small></div>
<table>{rows}</table></div><div class="faces">{faces}</div></main>"""


def cell(value: float) -> str:
    """A number of the table, the redder the further below 0, the bluer above."""
    if value == 0:
        return '<td class="k" style="color:#aaa">0</td>'
    strength = min(abs(value), 1.5) / 1.5 * 0.45
    colour = f"rgba({'9,105,218' if value > 0 else '207,34,46'},{strength:.2f})"
    return f'<td class="k" style="background:{colour}">{value:.2f}</td>'


def picture(x: torch.Tensor) -> str:
    image = Image.fromarray(to_uint8(x[None])[0])
    return f'<img class="x" src="{data_uri(image, "PNG")}">'


def row(name: str, cells: list[str]) -> str:
    return f'<tr><th class="name">{name}</th>{"".join(cells)}</tr>'


def main() -> None:
    model = diffusion.load(SHIPPED, device="cpu")
    table = model.table("dpmpp_2m_sde", STEPS)
    frames = list(model.frames(FACES, table=table, amp="no"))
    rows = []
    for name, column in COLUMNS:
        rows.append(row(f"k of {name}", [cell(k) for k in table.to_x[:, column].tolist()]))
    rows.append('<tr class="gap"><td></td></tr>')
    for i in range(len(FACES)):
        pictures = [[f"<td>{picture(frame[part][i])}</td>" for frame in frames] for part in (0, 1)]
        rows.append(row("x<sub>s</sub>", pictures[0]))
        rows.append(row("x&#770;<sub>0</sub>", pictures[1]))
    faces = grid(to_uint8(model.sample(range(16, 40), steps=20, amp="no")), columns=4)
    body = PAGE.format(rows="".join(rows), faces=f'<img src="{data_uri(faces, "PNG")}">')
    chromium = shutil.which("chromium") or sys.exit("error: install chromium, which draws the page")
    target = common.ROOT / "docs" / "images" / "figure.png"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figure.html"
        file.write_text(body)
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1200,498"]
        shot = f"--screenshot={target}"
        subprocess.run([chromium, *options, shot, file.as_uri()], check=True, capture_output=True)
    print(target)


if __name__ == "__main__":
    main()
