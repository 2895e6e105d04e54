"""What --data means: a folder, a named set, a hub set or the toy, as one `ImageSet`.

An ImageSet knows its images by index and reads them one at a time; keeping them decoded is
cache.py's work, putting them into batches batches.py's.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from .. import UserError
from ..distributed import log
from ..weights.guards import decode_text
from . import toy
from .images import SUFFIXES, read_image

CLASS_SPLITS = ("train", "val", "test")  # AFHQ's layout: train/cat/*.jpg
MOST_CAPTION, MOST_LINE = 1 << 16, 1 << 20  # bytes of a .txt, characters of a metadata.jsonl's line
HELD_OUT_FROM, HELD_OUT_SHARE, HELD_OUT_MOST = 100, 0.02, 256


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N images by index.

    read(i, size): (size, size, 3) uint8; raises BadImage.
    names: unique, stable between runs. labels: N class numbers, -1 where an image has none.
    captions: N texts, or None where the set has none at all.
    stamp: changes whenever a file's content may have; part of the cache's key.
    """

    name: str
    names: list[str]
    read: Callable[[int, int], np.ndarray]
    labels: list[int]
    classes: list[str] = field(default_factory=list)
    captions: list[str] | None = None
    stamp: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, indices) -> "ImageSet":
        indices = [int(i) for i in indices]
        return replace(
            self,
            names=[self.names[i] for i in indices],
            read=lambda i, size: self.read(indices[i], size),
            labels=[self.labels[i] for i in indices],
            captions=self.captions and [self.captions[i] for i in indices],
        )

    def order_key(self) -> str:
        """A digest of the names: two runs with the same one see the same images in order."""
        return digest(*self.names)


def digest(*parts: str) -> str:
    """Hex digest of texts, which may hold undecodable file-name bytes."""
    h = hashlib.sha256()
    for part in parts:
        h.update(os.fsencode(part) + b"\0")
    return h.hexdigest()[:32]


def held_out(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(train, held-out) indices; held out are min(256, 2 %), chosen by a hash of the name."""
    n = len(names)
    count = min(HELD_OUT_MOST, int(HELD_OUT_SHARE * n)) if n >= HELD_OUT_FROM else 0
    order = sorted(range(n), key=lambda i: digest(names[i]))
    return np.sort(order[count:]), np.sort(order[:count]).astype(int)


def report(what: str, problems: list[tuple[str, str]], total: int, most: int = 20) -> None:
    """One warning that counts and names what was wrong. Names may hold anything: shown by repr."""
    if not problems:
        return
    lines = [f"  {name!r}: {reason}" for name, reason in problems[:most]]
    if len(problems) > most:
        lines.append(f"  ... and {len(problems) - most} more")
    log("\n".join([f"warning: {len(problems)} of {total} {what}:", *lines]))


# --- sources -------------------------------------------------------------------------------------


def toy_set() -> ImageSet:
    return ImageSet(
        name="toy",
        names=[f"toy/{i:05d}" for i in range(toy.COUNT)],
        read=toy.draw,
        labels=[toy.STYLE.index(toy.attributes(i)["hair_style"]) for i in range(toy.COUNT)],
        classes=list(toy.STYLE),
        captions=[toy.caption(i) for i in range(toy.COUNT)],
        stamp=digest(Path(toy.__file__).read_text(encoding="utf-8")),
    )


def scan(root: Path) -> list[Path]:
    """Image files below root at any depth, sorted; hidden ones left out, link loops cut."""
    found, seen, outside = [], set(), []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        where = os.stat(folder)
        if (where.st_dev, where.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((where.st_dev, where.st_ino))
        subfolders[:] = sorted(d for d in subfolders if not d.startswith("."))
        for name in [d for d in subfolders if not inside(Path(folder, d), root)]:
            subfolders.remove(name)
            outside.append(str(Path(folder, name)))
        for name in files:
            file = Path(folder, name)
            if not name.startswith(".") and file.suffix.lower() in SUFFIXES:
                (found if inside(file, root) else outside).append(file)
    problems = [(str(path), "not read; put a copy or a hard link there") for path in outside]
    report("entries are links that lead out of the folder", problems, len(found) + len(outside))
    return sorted(found, key=os.fsencode)


def inside(path: Path, root: Path) -> bool:
    """Whether what is read there lies below root: a set from elsewhere may link to anything."""
    if not path.is_symlink():
        return True  # its folder has been asked
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def folder_set(root: Path, data_class: str = "all", default_caption: str = "") -> ImageSet:
    """All images below a folder. Class = the first folder below root (or below root/train).

    Captions come from `name.txt` beside an image, or from a metadata.jsonl with file_name and
    text. Raises UserError if there is no image, or none of the class.
    """
    files = scan(root)
    if not files:
        raise UserError(f"no images below {root}; looked for {' '.join(sorted(SUFFIXES))}")
    base = root / "train" if _has_splits(root, files) else root
    if base != root:
        kept = [f for f in files if base in f.parents]
        log(f"{root}: using its train split, {len(kept)} of {len(files)} images")
        files = kept
    relative = [f.relative_to(base) for f in files]
    classes = sorted({r.parts[0] for r in relative if len(r.parts) > 1}, key=os.fsencode)
    if data_class != "all":
        if data_class not in classes:
            raise UserError(
                f"data_class {data_class!r} is no folder of {base}; it has "
                f"{', '.join(classes) or 'no class folders'}"
            )
        keep = [i for i, r in enumerate(relative) if r.parts[0] == data_class]
        files, relative = [files[i] for i in keep], [relative[i] for i in keep]
        classes = [data_class]
    number = {c: i for i, c in enumerate(classes)}
    stats = [file_stamp(f) for f in files]
    return ImageSet(
        name=str(root),
        names=[r.as_posix() for r in relative],
        read=lambda i, size: read_image(files[i], size),
        labels=[number.get(r.parts[0], -1) if len(r.parts) > 1 else -1 for r in relative],
        classes=classes,
        captions=read_captions(base, files, default_caption),
        stamp=digest(str(base.resolve()), *stats),
    )


def _has_splits(root: Path, files: list[Path]) -> bool:
    tops = {f.relative_to(root).parts[0] for f in files}
    return "train" in tops and tops <= set(CLASS_SPLITS)


def file_stamp(file: Path) -> str:
    try:
        s = file.stat()
    except OSError:
        return "missing"  # a broken link: reading reports it
    return f"{s.st_size} {s.st_mtime_ns}"


def read_captions(base: Path, files: list[Path], default: str) -> list[str] | None:
    """A caption for each file, or None where no file has one. Problems are told in one warning."""
    table = _metadata(base)
    captions, problems, found = [], [], False
    for file in files:
        text = table.get(file)
        side = file.with_suffix(".txt")
        if text is None and side.is_file():
            if inside(side, base):
                text = _caption(side, problems)
            else:
                problems.append((str(side), "leads out of the data folder; not read"))
        found |= text is not None
        if text is None:
            problems.append((str(file), f"no caption; using {default!r}"))
        elif not text.strip():
            problems.append((str(file), f"empty caption; using {default!r}"))
        captions.append(" ".join((text or "").split()) or default)
    if not found:
        return [default] * len(files) if default else None
    report("captions have problems", problems, len(files))
    return captions


def _caption(side: Path, problems: list) -> str | None:
    with open(side, "rb") as file:
        raw = file.read(MOST_CAPTION + 1)
    if len(raw) > MOST_CAPTION:
        problems.append((str(side), f"more than {MOST_CAPTION:,} bytes; cut off there"))
    try:
        text, encoding = decode_text(raw[:MOST_CAPTION], cut=len(raw) > MOST_CAPTION)
    except ValueError as error:
        problems.append((str(side), f"{error}; not read"))
        return None
    if encoding != "UTF-8":
        problems.append((str(side), f"not UTF-8; read as {encoding}"))
    return text


def _metadata(base: Path) -> dict[Path, str]:
    """{image path: text} from the metadata.jsonl files below base."""
    table = {}
    for file in sorted(base.rglob("metadata.jsonl")):
        if not inside(file, base):
            log(f"warning: {str(file)!r} leads out of the data folder and is not read")
            continue
        number = 0
        try:
            for line in _lines(file):
                number += 1
                if line.strip():
                    row = json.loads(line)
                    text = str(row["text"])[:MOST_CAPTION]
                    # JSON may escape halves of characters, which are no text
                    text = text.encode("utf-8", "replace").decode("utf-8")
                    table[file.parent / row["file_name"]] = text
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"{file} cannot be read: {error}; expected UTF-8 text") from None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: {error!r:.200}; expected a JSON object with "
                            "file_name and text") from None  # fmt: skip
    return table


def _lines(file: Path) -> Iterator[str]:
    """Of a text file that may be larger than the memory."""
    if not file.is_file():
        raise OSError("it is no regular file")  # a pipe would be waited for
    with open(file, encoding="utf-8-sig", newline="\n") as lines:
        while line := lines.readline(MOST_LINE):
            if len(line) == MOST_LINE:
                raise ValueError(f"more than {MOST_LINE:,} characters")
            yield line


def open_data(data: str, data_class: str = "all", default_caption: str = "") -> ImageSet:
    """What --data names: toy, hf:owner/name, a folder, data/NAME, or a set that can be fetched."""
    from . import hub

    if data == "toy":
        return only_class(toy_set(), data_class)
    if data.startswith("hf:"):
        return only_class(hub.hub_set(data[3:], default_caption), data_class)
    for root in (Path(data), Path("data") / data):
        for folder in (root, root / "cifar-10-batches-bin"):
            if hub.is_cifar(folder):
                return only_class(hub.cifar_set(folder), data_class)
        if root.is_dir():
            return folder_set(root, data_class, default_caption)
        if root.is_file():
            raise UserError(f"{root} is a file; --data takes a folder of images")
    if data in hub.NAMED:
        return only_class(hub.named_set(data, data_class, default_caption), data_class)
    raise UserError(
        f"--data {data!r} is neither a folder nor a known set: no folder of this name is here or "
        f"in data/, and the sets are toy, {', '.join(hub.NAMED)}, hf:owner/name"
    )


def only_class(images: ImageSet, data_class: str) -> ImageSet:
    """The images of one class. Raises UserError if the set does not have it."""
    if data_class == "all" or images.classes == [data_class]:
        return images
    if data_class not in images.classes:
        raise UserError(
            f"data_class {data_class!r} is no class of {images.name}; it has "
            f"{', '.join(images.classes) or 'no classes'}"
        )
    wanted = images.classes.index(data_class)
    chosen = images.subset([i for i, label in enumerate(images.labels) if label == wanted])
    return replace(chosen, classes=[data_class], labels=[0] * len(chosen))
