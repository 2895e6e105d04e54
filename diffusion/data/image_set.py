"""What --data means: a folder, a named set, a hub set or the toy, as one `ImageSet`.

An ImageSet knows its images by index and reads them one at a time; keeping them decoded is
cache.py's work, putting them into batches batches.py's.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from .. import UserError
from ..config import Config
from ..runtime.distributed import log
from . import toy
from .captions import Selection, read_captions, without_image
from .folder import choose_split, listed, walk
from .images import SUFFIXES, read_image

HELD_OUT_FROM = 100
HELD_OUT_SHARE = 0.02
HELD_OUT_MOST = 256


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N images by index.

    read(i, size): (size, size, 3) uint8; raises BadImage.
    names: unique, stable between runs. labels: N class numbers, -1 where an image has none.
    texts: N images' captions, of which a step samples one; None where the set has none at all.
    stamp: changes whenever a file's content may have; part of the cache's key.
    """

    name: str
    names: list[str]
    read: Callable[[int, int], np.ndarray]
    labels: list[int]
    classes: list[str] = field(default_factory=list)
    texts: list[tuple[str, ...]] | None = None
    stamp: str = ""

    @cached_property
    def captions(self) -> list[str] | None:
        """The first caption of each image."""
        return self.texts and [texts[0] for texts in self.texts]

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, indices) -> "ImageSet":
        indices = [int(i) for i in indices]
        return replace(
            self,
            names=[self.names[i] for i in indices],
            read=lambda i, size: self.read(indices[i], size),
            labels=[self.labels[i] for i in indices],
            texts=self.texts and [self.texts[i] for i in indices],
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


# --- sources -------------------------------------------------------------------------------------


def toy_set() -> ImageSet:
    return ImageSet(
        name="toy",
        names=[f"toy/{i:05d}" for i in range(toy.COUNT)],
        read=toy.draw,
        labels=[toy.STYLE.index(toy.attributes(i)["hair_style"]) for i in range(toy.COUNT)],
        classes=list(toy.STYLE),
        texts=[(toy.caption(i),) for i in range(toy.COUNT)],
        stamp=digest(Path(toy.__file__).read_text(encoding="utf-8")),
    )


def folder_set(
    root: Path,
    data_class: str = "all",
    default_caption: str = "",
    selection: Selection | None = None,
    written: Iterable[Path] = (),
) -> ImageSet:
    """All images below a folder, or below its train split. Class = the first folder on the way.

    written: folders below root that a run writes to. Captions are read as captions.py says. Raises
    UserError if there is no image, or none of the class or split.
    """
    selection = selection or Selection()
    found = walk(root, written).report()
    if not found.images:
        raise UserError(
            f"no images below {root}; looked for {' '.join(sorted(SUFFIXES))}"
            + (f"; {found.why_left_out()}" if found.left_out else "")
        )
    part = choose_split(root, found.images, selection.split)
    files = part.files
    of = part.classes
    if not files:
        raise UserError(f"no images to train on below {root}: {part.about}")
    counts = Counter(c for c in of if c is not None)
    classes = sorted(counts, key=os.fsencode)
    log(
        f"data: {root}: {part.about}; "
        + (f"classes: {listed((c, counts[c]) for c in classes)}" if classes else "no class folders")
        + (f"; in none: {of.count(None):,}" if classes and None in of else "")
    )
    alone = Counter(path.suffix for path in without_image(found, found.images))
    if ignored := found.others + alone:
        log(
            f"data: {root}: files not looked at: {listed(sorted(ignored.items()))}"
            + (f"; {alone.total():,} of them stand beside no image" if alone else "")
        )
    if data_class != "all":
        if data_class not in classes:
            raise UserError(
                f"data_class {data_class!r} is no folder of {part.base}; it has "
                f"{', '.join(classes) or 'no class folders'}"
            )
        files = [f for f, c in zip(files, of) if c == data_class]
        of = [data_class] * len(files)
        classes = [data_class]
    number = {c: i for i, c in enumerate(classes)}
    stats = [file_stamp(f) for f in files]
    return ImageSet(
        name=str(root),
        names=[f.relative_to(part.base).as_posix() for f in files],
        read=lambda i, size: read_image(files[i], size),
        labels=[-1 if c is None else number[c] for c in of],
        classes=classes,
        texts=read_captions(root, files, default_caption, selection, found),
        stamp=digest(str(part.base.resolve()), *stats),
    )


def file_stamp(file: Path) -> str:
    try:
        s = file.stat()
    except OSError:
        return "missing"  # a broken link: reading reports it
    return f"{s.st_size} {s.st_mtime_ns}"


def open_data(
    data: str,
    data_class: str = "all",
    default_caption: str = "",
    selection: Selection | None = None,
    written: Iterable[Path] = (),
) -> ImageSet:
    """What --data names: toy, hf:owner/name, a folder, data/NAME, or a set that can be fetched."""
    from . import hub

    if data == "toy":
        return only_class(toy_set(), data_class)
    if data.startswith("hf:"):
        return only_class(hub.hub_set(data[3:], default_caption, selection), data_class)
    for root in (Path(data), Path("data") / data):
        for folder in (root, root / "cifar-10-batches-bin"):
            if hub.is_cifar(folder):
                return only_class(hub.cifar_set(folder, selection), data_class)
        if root.is_dir():
            return folder_set(root, data_class, default_caption, selection, written)
        if root.is_file():
            raise UserError(f"{root} is a file; --data takes a folder of images")
    if data in hub.NAMED:
        return only_class(hub.named_set(data, data_class, default_caption, selection), data_class)
    raise UserError(
        f"--data {data!r} is neither a folder nor a known set: no folder of this name is here or "
        f"in data/, and the sets are toy, {', '.join(hub.NAMED)}, hf:owner/name"
    )


def configured(config: Config) -> tuple:
    """The arguments of `open_data`, of which a run leaves out what it writes itself."""
    c = config
    written = [Path(f) for f in (c.save_folder, c.cache_dir, c.class_data) if f is not None]
    return c.data, c.data_class, c.default_caption, Selection.of(c), written


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
