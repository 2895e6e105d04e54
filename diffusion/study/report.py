"""report.html: one file, without network or script, that shows what a study has found.

Every text that comes from captions, prompts and file names is escaped.
"""

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from ..files.checkpoint import write_text
from ..pictures.plot import Line, line_plot
from .plan import EXPERIMENTS, Cell, ablation, first, methods

# column: (heading, how it is written)
MEASURES = {
    "style_share": ("style share", lambda v: f"{v:.0%}"),
    "frechet": ("Fréchet distance", lambda v: f"{v:.3g}"),
    "clip_score": ("CLIP score", lambda v: f"{v:.1f}"),
    "other_style_share": ("share of the second", lambda v: f"{v:.0%}"),
    "other_frechet": ("Fréchet to the second", lambda v: f"{v:.3g}"),
}
COSTS = {
    "seconds": ("seconds", lambda v: f"{v:.0f}"),
    "cpu_seconds": ("CPU seconds", lambda v: f"{v:.0f}"),
    "images_per_second": ("images/s", lambda v: f"{v:.3g}"),
    "peak_memory": ("peak memory", lambda v: f"{v / 2**20:.0f} MiB"),
    "peak_device_memory": ("peak on device", lambda v: f"{v / 2**20:.0f} MiB"),
    "file_bytes": ("file", lambda v: f"{v / 2**10:,.0f} KiB"),
}
KINDS = {
    "base": "base",
    "lora": "LoRA",
    "textual_inversion": "Textual Inversion",
    "dreambooth": "DreamBooth",
    "mix": "mixture",
}
COST_NOTES = {
    "seconds": "wall-clock of the training command with its start, kept latents being made once "
    "for each set of captions; * it was stopped and continued: the last part only",
    "CPU seconds": "of the same process, over all cores",
    "images/s": "median of the training log",
    "peak memory": "of the training process, in main memory, libraries included; of the device "
    "where that is a GPU",
    "file": "adapter.safetensors, or DreamBooth's whole network, ema.safetensors",
}


# --- pieces of HTML ------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    """Of plain texts, which are escaped here."""
    cells = lambda tag, row: "".join(f"<{tag}>{escape(v)}</{tag}>" for v in row)  # noqa: E731
    lines = [f"<tr>{cells('td', row)}</tr>" for row in rows]
    return (
        f'<div class="wide"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>'
        f"{''.join(lines)}</tbody></table></div>"
    )


def data_uri(picture: Image.Image | Path) -> str:
    out = io.BytesIO()
    if isinstance(picture, Path):
        out.write(picture.read_bytes())
    else:
        picture.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def figure(picture: Image.Image | Path, caption: str, more: list[str] | None = None) -> str:
    """With a caption; `more` lines of it are shown when asked for. Nothing where no file is."""
    if isinstance(picture, Path) and not picture.is_file():
        return ""
    text = escape(caption, quote=True)
    lines = "".join(f"<li>{escape(line)}</li>" for line in more or [])
    lines = f"<details><summary>prompts</summary><ol>{lines}</ol></details>" if lines else ""
    return (
        f'<figure><img src="{data_uri(picture)}" alt="{text}"><figcaption>{text}{lines}'
        "</figcaption></figure>"
    )


# --- tables of cells -----------------------------------------------------------------------------


def values(entry: dict, columns: dict, part: str) -> list[str]:
    found = []
    for name, (_, told) in columns.items():
        value = entry.get(part, {}).get(name)
        value = value["value"] if isinstance(value, dict) else value
        mark = "*" if name == "seconds" and entry.get("attempts", 1) > 1 else ""
        found.append("-" if value is None else told(value) + mark)
    return found


def present(entries: list[dict], columns: dict, part: str) -> dict:
    """The columns in which something stands."""
    return {
        k: v for k, v in columns.items() if any(e.get(part, {}).get(k) is not None for e in entries)
    }


def cell_table(rows: list[tuple[str, dict]]) -> str:
    """(name, entry of metrics.json) each."""
    entries = [entry for _, entry in rows]
    measures = present(entries, MEASURES, "measures")
    costs = present(entries, COSTS, "cost")
    head = ["", *(t for t, _ in measures.values()), *(t for t, _ in costs.values())]
    lines = [
        [name, *values(entry, measures, "measures"), *values(entry, costs, "cost")]
        for name, entry in rows
    ]
    return table(head, lines)


class Page:
    """Collects the report's sections from a study (see run.Study)."""

    def __init__(self, study):
        self.study = study
        self.s = study.settings
        self.slugs = {style.name: style.slug for style in study.styles}
        self.parts: list[str] = []

    def entry(self, cell: Cell) -> dict | None:
        found = self.study.metrics["cells"].get(cell.name, {})
        return found if "measures" in found else None

    def add(self, *parts: str) -> None:
        self.parts += parts

    def strip(self, cell: Cell, title: str) -> str:
        entry = self.entry(cell)
        file = self.study.folder / "thumbnails" / f"{cell.name}.png"
        return figure(file, title, entry["prompts"]) if entry else ""

    def base(self, style: str) -> Cell:
        return next(c for c in self.study.cells if c.kind == "base" and c.style == style)

    def rows(self, cells: list[tuple[str, Cell]], style: str) -> list[tuple[str, dict]]:
        """Those that are done, between the untouched base and real images."""
        named = [("base, untouched", self.base(style)), *cells]
        found = [(name, self.entry(cell)) for name, cell in named]
        real = {"measures": self.study.metrics["real"][style]}
        return [(n, e) for n, e in found if e is not None] + [("real images", real)]

    def real(self, style: str) -> str:
        file = self.study.folder / "thumbnails" / f"real_{self.slugs[style]}.png"
        return figure(file, f"{style}: held-out images")

    # --- sections --------------------------------------------------------------------------------

    def head(self) -> None:
        s = self.s
        study = self.study
        base = s.load_path or s.sd_path
        done = sum(map(study.done, study.cells))
        state = "" if study.metrics["finished"] else f" Unfinished: {done} of {len(study.cells)}."
        self.add(
            f"<h1>Style study: {escape(Path(s.data).name)}</h1>",
            f'<p class="soft">Base {escape(str(base))}, {study.base.image_size} px; budget '
            f"{escape(s.budget)}: {s.steps} steps of {s.batch_size}, {s.num_images} images a "
            f"cell, {escape(s.sampler)} with {s.sample_steps} steps, guidance "
            f"{study.base.guidance_scale:g}, seed {s.seed}.{state}</p>",
        )
        rows = [
            [
                style.name,
                "learnt" if style.name in s.styles else "known",
                str(len(style.train)),
                str(len(style.held_out)),
                str(len(style.prompts)),
            ]
            for style in study.styles
        ]
        self.add(table(["style", "", "training images", "held out", "prompts"], rows))

    def controls(self) -> None:
        """What the base draws of every style, and how far the classifier can be trusted."""
        study = self.study
        self.add("<h2>Before: the untouched base</h2>")
        for measure in study.metrics.get("classifier", {}).values():
            told = f"{measure['definition']} ({measure['num_images']} images)"
            self.add(f'<p class="soft">Classifier: {measure["value"]:.1%}, {escape(told)}.</p>')
        rows = [(style.name, self.entry(self.base(style.name))) for style in study.styles]
        rows = [(n, e) for n, e in rows if e is not None]
        if rows:
            self.add(cell_table(rows))
        for style in study.styles:
            told = f"base, prompts of {style.name}"
            self.add(self.real(style.name), self.strip(self.base(style.name), told))

    def each_style(self) -> None:
        self.add(f"<h2>1. {escape(EXPERIMENTS[1][0].upper() + EXPERIMENTS[1][1:])}</h2>")
        for style, cell in zip(self.s.styles, first(self.s, self.slugs)):
            self.add(
                f"<h3>{escape(style)}</h3>",
                cell_table(self.rows([("LoRA", cell)], style)),
                self.strip(cell, "LoRA"),
            )

    def ablation(self) -> None:
        style = self.s.styles[0]
        self.add(
            f"<h2>2. Ablation, {escape(style)}</h2>",
            f'<p class="soft">Around rank {self.s.rank} ({escape(self.s.targets)} layers), '
            f"{self.s.steps} steps, learning rate {self.s.learning_rate:g}, one at a time.</p>",
        )
        for field, cells in ablation(self.s, self.slugs).items():
            what = field.replace("_", " ")
            named = [(f"{what} {getattr(c, field):g}", c) for c in cells]
            self.add(
                f"<h3>{what.capitalize()}</h3>",
                cell_table(self.rows(named, style)),
                '<div class="plots">',
                *self.plots(what, field, cells),
                "</div>",
                *(self.strip(c, name) for name, c in named),
            )

    def plots(self, what: str, field: str, cells: list[Cell]) -> list[str]:
        """Each measure over what changes."""
        found = []
        done = [(getattr(c, field), e["measures"]) for c in cells if (e := self.entry(c))]
        for name, (heading, _) in MEASURES.items():
            points = [(x, measures[name]["value"]) for x, measures in done if name in measures]
            if len(points) > 1:
                title = heading.replace("é", "e")  # Pillow's font knows ASCII only
                lines = [Line(*zip(*points), dots=True)]
                plot = line_plot(lines, title, what, log_x=True, size=(480, 300))
                found.append(figure(plot, f"{heading} over {what}"))
        return found

    def three(self) -> None:
        style = self.s.styles[0]
        cells = [(KINDS[c.kind], c) for c in methods(self.s, self.slugs)]
        self.add(
            f"<h2>3. Three methods, {escape(style)}</h2>",
            f'<p class="soft">The same {len(self.study.by_name[style].train)} images, '
            f"{self.s.steps} steps each.</p>",
            cell_table(self.rows(cells, style)),
            self.real(style),
            self.strip(self.base(style), "base"),
            *(self.strip(c, name) for name, c in cells),
        )

    def between(self) -> None:
        cells = [c for c in self.study.cells if c.kind == "mix"]
        a, b = self.s.styles[:2]
        done = [(c, self.entry(c)) for c in cells if self.entry(c)]
        self.add(
            f"<h2>4. From {escape(a)} to {escape(b)}</h2>",
            f'<p class="soft">LoRA of {escape(a)} with weight 1 - w, of {escape(b)} with w; '
            "the prompts name neither.</p>",
        )
        if done:
            self.add(cell_table([(f"w = {c.share:.2f}", e) for c, e in done]))
        shares = [
            (label, [(c.share, e["measures"][k]["value"]) for c, e in done if k in e["measures"]])
            for k, label in (("style_share", "first style"), ("other_style_share", "second style"))
        ]
        lines = [Line(*zip(*points), label, dots=True) for label, points in shares if points]
        if lines:
            self.add(
                figure(
                    line_plot(lines, "Share of each style", "w", size=(560, 320)),
                    "What the classifier takes the images for",
                )
            )
        file = self.study.folder / "thumbnails" / "interpolation.png"
        self.add(figure(file, f"{a} (left) to {b} (right); the same noise and prompt in each row"))

    def meaning(self) -> None:
        found: dict[tuple, set] = {}  # what is measured, how and by what: of how many images
        for entry in self.study.metrics["cells"].values():
            for name, one in entry.get("measures", {}).items():
                kind = (MEASURES[name][0], one["definition"], one["model"])
                found.setdefault(kind, set()).add(one["num_images"])
        self.add("<h2>What the numbers are</h2><dl>")
        for (heading, definition, model), counts in found.items():
            self.add(
                f"<dt>{escape(heading)}</dt><dd>{escape(definition)}. Model: {escape(model)}; "
                f"{' or '.join(map(str, sorted(counts)))} images.</dd>"
            )
        for name, text in COST_NOTES.items():
            self.add(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>")
        self.add("</dl>")


def write_report(study) -> Path:
    page = Page(study)
    page.head()
    page.controls()
    sections = {1: page.each_style, 2: page.ablation, 3: page.three, 4: page.between}
    for number in sorted(study.settings.experiments):
        sections[number]()
    page.meaning()
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    body = "\n".join(part for part in page.parts if part)
    title = escape(f"Style study: {Path(study.settings.data).name}")
    head, foot = template.split("@@BODY@@")  # split first: the body may hold any text
    path = study.folder / "report.html"
    write_text(path, head.replace("@@TITLE@@", title) + body + foot)
    return path
