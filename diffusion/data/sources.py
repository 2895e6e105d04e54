"""What --data means: a folder, a named set, a set of the hub or the toy, as one `ImageSet`."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .. import UserError
from ..config import Config
from ..runtime.distributed import log
from . import toy
from .archives import cifar_set, fetch
from .captions import EVERYTHING, Selection, read_captions, without_image
from .folder import choose_split, counted, walk
from .hub import hub_set
from .image_set import ImageSet, digest, file_stamp
from .images import SUFFIXES, read_image

NAMED = {  # a set of the hub, or the address of an archive
    "anime_faces": "hf:jlbaker361/anime_faces_dim_128_50k",
    "pokemon": "hf:huggan/pokemon",
    "afhq": "https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1",
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
}


def toy_set() -> ImageSet:
    every = range(toy.COUNT)
    return ImageSet(
        name="toy",
        names=[f"toy/{i:05d}" for i in every],
        read=lambda i, size, *_: toy.draw(i, size),
        labels=[toy.STYLE.index(toy.attributes(i)["hair_style"]) for i in every],
        classes=list(toy.STYLE),
        texts=[(toy.caption(i),) for i in every],
        stamp=toy.VERSION,
    )


def folder_set(
    root: Path,
    data_class: str = "all",
    default_caption: str = "",
    selection: Selection = EVERYTHING,
    written: Iterable[Path] = (),
) -> ImageSet:
    """Take all images below a folder, or its train split. Class = the first folder on the way.

    written: folders below root that a run writes to. Captions are read as captions.py says. Raises
    UserError if there is no image, or none of the class or split.
    """
    found = walk(root, written).report()
    if not found.images:
        raise UserError(
            f"no images below {root}; looked for {' '.join(sorted(SUFFIXES))}; "
            f"{found.why_left_out()}"
        )
    part = choose_split(root, found.images, selection.split)
    if not part.files:
        raise UserError(f"no images to train on below {root}: {part.about}")
    counts = Counter(c for c in part.classes if c is not None)
    classes = sorted(counts, key=os.fsencode)
    shown = counted((c, counts[c]) for c in classes) or "none"
    log(f"data: {root}: {part.about}; classes: {shown}")
    alone = Counter(path.suffix for path in without_image(found))
    if ignored := found.others + alone:
        log(
            f"data: {root}: files not looked at: {counted(sorted(ignored.items()))}; "
            f"{alone.total():,} of them stand beside no image"
        )
    chosen = [pair for pair in zip(part.files, part.classes) if data_class in ("all", pair[1])]
    if not chosen:
        raise UserError(f"data_class {data_class!r} is no folder of {part.base}; classes: {shown}")
    classes = classes if data_class == "all" else [data_class]
    files = [file for file, _ in chosen]
    return ImageSet(
        name=str(root),
        names=[file.relative_to(part.base).as_posix() for file in files],
        read=lambda i, size, note=None: read_image(files[i], size, note),
        labels=[-1 if c is None else classes.index(c) for _, c in chosen],
        classes=classes,
        texts=read_captions(found, files, default_caption, selection),
        stamp=digest(str(part.base.resolve()), *map(file_stamp, files)),
    )


def open_data(
    data: str,
    data_class: str = "all",
    default_caption: str = "",
    selection: Selection = EVERYTHING,
    written: Iterable[Path] = (),
) -> ImageSet:
    """Open what --data names: toy, hf:owner/name, a folder, data/NAME, or a set to be fetched."""
    if data == "toy":
        return toy_set().only(data_class)
    roots = (Path(data), Path("data") / data)
    root = next((root for root in roots if root.exists()), None)
    source = data if root is not None else NAMED.get(data, data)
    if source.startswith("hf:"):
        return hub_set(source[3:], default_caption, selection).only(data_class)
    if root is None and data in NAMED:
        root = roots[1]
        fetch(source, root)
    if root is None or not root.is_dir():
        raise UserError(
            f"--data {data!r} is neither a folder of images, here or in data/, nor a known set: "
            f"toy, {', '.join(NAMED)}, hf:owner/name"
        )
    for folder in (root, root / "cifar-10-batches-bin"):
        if (folder / "data_batch_1.bin").is_file():
            return cifar_set(folder, selection).only(data_class)
    return folder_set(root, data_class, default_caption, selection, written)


def configured(config: Config) -> tuple:
    """Give the arguments of `open_data`, of which a run leaves out what it writes itself."""
    c = config
    written = [Path(f) for f in (c.save_folder, c.cache_dir, c.class_data) if f is not None]
    return c.data, c.data_class, c.default_caption, Selection.of(c), written
