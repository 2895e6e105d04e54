"""Write report.html: one file, without network or script, that shows what a study has found.

The page is report.html beside this file, with the tables and figures put in. Every text that comes
from captions, prompts and file names is escaped.
"""

from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from ..data.images import BadImage, read_image
from ..files.atomic import write_text
from ..pictures.grid import data_uri
from ..pictures.plot import Line, line_plot
from .plan import Cell, Tables

# a number of metrics.json: (its column's heading, how it is written, in units of)
COLUMNS = {
    name: (heading, form, int(unit))
    for name, heading, form, unit in (
        map(str.strip, row.split("|"))
        for row in """
style_share        | classified as the style  | {:.0%}      | 1
frechet            | Fréchet distance         | {:.3g}      | 1
clip_score         | CLIP score               | {:.1f}      | 1
other_style_share  | classified as the second | {:.0%}      | 1
other_frechet      | Fréchet to the second    | {:.3g}      | 1
seconds            | seconds                  | {:.0f}      | 1
cpu_seconds        | CPU seconds              | {:.0f}      | 1
images_per_second  | images/s                 | {:.3g}      | 1
peak_memory        | peak memory              | {:.0f} MiB  | 1048576
peak_device_memory | peak on device           | {:.0f} MiB  | 1048576
file_bytes         | file                     | {:,.0f} KiB | 1024
""".strip().splitlines()
    )
}


# --- HTML ----------------------------------------------------------------------------------------


def table(rows: dict[str, dict]) -> str:
    """Write a table of plain texts or numbers, escaped here: {row: {column: text}}."""
    head = dict.fromkeys(column for row in rows.values() for column in row)
    body = [[name, *(row.get(column, "-") for column in head)] for name, row in rows.items()]
    lines = ""
    for tag, texts in [("th", ["", *head]), *(("td", texts) for texts in body)]:
        lines += f"<tr>{''.join(f'<{tag}>{escape(str(text))}</{tag}>' for text in texts)}</tr>"
    return f'<div class="wide"><table>{lines}</table></div>'


def figure(picture: Image.Image | Path, caption: str, prompts: list[str] = ()) -> str:
    """Write a picture with its caption, and prompts to unfold; nothing where no such file is."""
    if isinstance(picture, Path):
        try:
            picture = Image.fromarray(read_image(picture, None))
        except BadImage:
            return ""
    text = escape(caption)
    lines = "".join(f"<li>{escape(prompt)}</li>" for prompt in prompts)
    lines = lines and f"<details><summary>prompts</summary><ol>{lines}</ol></details>"
    source = data_uri(picture, "PNG", optimize=True)
    return (
        f'<figure><img src="{source}" alt="{text}"><figcaption>{text}{lines}</figcaption></figure>'
    )


# --- parts of the page, of a study (see experiment.py) --------------------------------------------


def texts_of(entry: dict) -> dict[str, str]:
    """Write the numbers of an entry of metrics.json: {heading: text}."""
    found = {name: m["value"] for name, m in entry["measures"].items()} | entry.get("cost", {})
    texts = {}
    for name, (heading, form, unit) in COLUMNS.items():
        if found.get(name) is not None:
            texts[heading] = form.format(found[name] / unit)
    if entry.get("attempts", 1) > 1 and "seconds" in texts:
        texts["seconds"] += "*"
    return texts


def cell_table(entries: dict[str, dict]) -> str:
    return table({name: texts_of(entry) for name, entry in entries.items()})


def done(study, cells: dict[str, Cell]) -> dict[str, dict]:
    """Return the entries of the cells that are done, by the names of their rows."""
    return {name: study.entry(cell) for name, cell in cells.items() if study.done(cell)}


def samples(study, entries: dict[str, dict]) -> str:
    return "".join(
        figure(study.thumbnail(entry["name"]), title, entry["prompts"])
        for title, entry in entries.items()
    )


def plots(entries: Iterable[dict], field: str, name: str) -> str:
    """Plot each measure over a field of entries, if they are two or more."""
    found = ""
    for measure, (heading, _, _) in COLUMNS.items():
        measured = [entry for entry in entries if measure in entry["measures"]]
        if len(measured) > 1:
            x = [entry[field] for entry in measured]
            y = [entry["measures"][measure]["value"] for entry in measured]
            picture = line_plot([Line(x, y)], measure, name, log_x=field != "share")
            found += figure(picture, f"{heading} over {name}")
    return f'<div class="plots">{found}</div>'


def untouched_base(study) -> str:
    """Show the base model's samples of every style, and the accuracy of the classifier."""
    text = ""
    for m in study.metrics.get("classifier", {}).values():
        about = f"{m['value']:.1%}, {escape(m['definition'])} ({m['num_images']} images)"
        text += f'<p class="soft">Classifier: {about}.</p>'
    for name, style in study.styles.items():
        text += figure(study.thumbnail(f"real_{style.slug}"), f"{name}: held-out images")
    entries = done(
        study, {f"base, prompts of {name}": study.plan.base(name) for name in study.styles}
    )
    return text + cell_table(entries) + samples(study, entries)


def experiment(study, number: int, tables: Tables) -> str:
    """Show an experiment: its tables, between the untouched base and real images, and samples."""
    s = study.settings
    first, second, *_ = (*s.styles, "")
    heading, about = {
        1: ("A LoRA for each style", ""),
        2: (
            f"Ablation, {first}",
            f"Around rank {study.plan.lora(first).rank} ({s.targets} layers), {s.steps} steps, "
            f"learning rate {s.learning_rate:g}, one at a time.",
        ),
        3: (
            f"Three methods, {first}",
            f"The same {len(study.styles[first].train)} images, {s.steps} steps each.",
        ),
        4: (
            f"From {first} to {second}",
            f"LoRA of {first} with weight 1 - w, of {second} with w; the prompts name neither.",
        ),
    }[number]
    text = f'<h2>{number}. {escape(heading)}</h2><p class="soft">{escape(about)}</p>'
    for title, cells in tables.items():
        name = title.replace("_", " ")
        entries = done(study, cells)
        style = next(iter(cells.values())).style
        base = done(study, {"base, untouched": study.plan.base(style)})
        real = {"real images": {"measures": study.metrics["real"][style]}}
        text += f"<h3>{escape(name)}</h3>{cell_table(base | entries | real)}"
        if number in (2, 4):
            text += plots(entries.values(), title, name)
        if number == 4:
            rows = "the same noise and prompt in each row"
            text += figure(study.thumbnail("interpolation"), f"{heading}; {rows}")
        text += samples(study, entries)
    return text


def definitions(entries: Iterable[dict]) -> str:
    """List what is measured, how and by which model, of how many images."""
    found = {}
    for entry in entries:
        for name, m in entry.get("measures", {}).items():
            kind = (COLUMNS[name][0], f"{m['definition']}. Model: {m['model']}")
            found.setdefault(kind, set()).add(m["num_images"])
    return "".join(
        f"<dt>{escape(heading)}</dt><dd>{escape(text)}; "
        f"{' or '.join(map(str, sorted(counts)))} images.</dd>"
        for (heading, text), counts in found.items()
    )


def write_report(study) -> Path:
    s = study.settings
    tables = study.plan.tables()
    summary = (
        f"Base model {Path(s.load_path or s.sd_path).resolve().name}, {s.image_size} px; "
        f"budget {s.budget}: "
        f"{s.steps} steps of {s.batch_size}, {s.num_images} images a cell, {s.sampler} with "
        f"{s.sample_steps} steps, guidance {s.guidance_scale:g}"
        f"{f' away from {Path(s.guide).name}' if s.guide else ''}, seed {s.seed}. "
        f"{sum(map(study.done, study.cells))} of {len(study.cells)} cells are finished."
    )
    styles = {
        name: {
            "role": "to learn" if name in s.styles else "known",
            "training images": len(style.train),
            "held out": len(style.held_out),
            "prompts": len(style.prompts),
        }
        for name, style in study.styles.items()
    }
    page = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    path = study.folder / "report.html"
    text = page.substitute(
        title=escape(f"Style study: {Path(s.data).name}"),
        summary=escape(summary),
        styles=table(styles),
        base=untouched_base(study),
        experiments="".join(experiment(study, n, tables[n]) for n in sorted(tables)),
        definitions=definitions(study.metrics["cells"].values()),
    )
    write_text(path, text.encode("utf-8", "replace").decode())  # paths may be no text
    return path
