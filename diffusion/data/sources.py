"""What --data means: a folder, a named set, a set of the hub or the toy, as one `ImageSet`."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .. import UserError, shown, some
from ..config import Config
from ..runtime.distributed import log
from . import toy
from .archives import cifar_set, fetch, unpacked
from .captions import EVERYTHING, Selection, read_captions
from .folder import choose_split, counted, walk
from .hub import hub_set
from .image_set import ImageSet, digest, file_stamp
from .images import SUFFIXES, read_image

# A set of the hub, or the address of an archive. None of the four was verified: there was no
# network where this was written. Where one has moved, the error says to give --data a folder.
NAMED = {
    "anime_faces": "hf:jlbaker361/anime_faces_dim_128_50k",
    "pokemon": "hf:huggan/pokemon",
    "afhq": "https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1",
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
}
SHA256 = {  # of these archives: cifar10's MD5 is on its page, afhq's is that of a published script
    NAMED["afhq"]: "7f63dcc14ef58c0e849b59091287e1844da97016073aac20403ae6c6132b950f",
    NAMED["cifar10"]: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
}
KOHYA = re.compile(r"([1-9]\d{0,3})_(.+)")  # a folder's name: repeats, and what it shows


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
            f"{found.why_left_out()}; other files: {counted(found.others) or 'none'}"
        )
    part = choose_split(root, found.images, selection.split)
    if not part.files:
        raise UserError(f"no images to train on below {root}: {part.about}")
    counts = Counter(c for c in part.classes if c is not None)
    classes = sorted(counts, key=os.fsencode)
    known = counted(counts) or "none"
    log(f"data: {root}: {part.about}; classes: {known}")
    if found.others:
        log(f"data: {root}: files not looked at: {counted(found.others)}")
    chosen = [pair for pair in zip(part.files, part.classes) if data_class in ("all", pair[1])]
    if not chosen:
        raise UserError(f"data_class {data_class!r} is no folder of {part.base}; classes: {known}")
    classes = classes if data_class == "all" else [data_class]
    concepts = {}
    if selection.captions:
        # its users have img/ beside reg/, class images for another purpose
        images = [pair for pair in chosen if pair[0].is_relative_to(part.base / "img")] or chosen
        concepts = _concepts(root, [file for file, _ in images])
        if concepts and len(images) < len(chosen):
            log(f"data: {root}: {len(chosen) - len(images):,} images beside img/ are left out")
            chosen = images
    files = [file for file, _ in chosen]
    return ImageSet(
        name=str(root),
        names=[file.relative_to(part.base).as_posix() for file in files],
        read=lambda i, size, note=None: read_image(files[i], size, note),
        labels=[-1 if c is None else classes.index(c) for _, c in chosen],
        classes=classes,
        texts=read_captions(
            found, files, default_caption, selection, {f: text for f, (_, text) in concepts.items()}
        ),
        stamp=digest(part.base.resolve(), *map(file_stamp, files)),
        repeats=[times for times, _ in concepts.values()] or None,
    )


def _concepts(root: Path, files: list[Path]) -> dict[Path, tuple[int, str]]:
    """Read (repeats, caption) of images from folders named as kohya's, 10_name, where all are.

    Folders 1_a, 2_b, 3_c ... are numbered, and mean nothing of the kind.
    """
    found = {folder: KOHYA.fullmatch(folder.name) for folder in {file.parent for file in files}}
    if not all(found.values()):
        ways = (folder.relative_to(root).parts for folder in found)
        if alike := set(filter(KOHYA.fullmatch, itertools.chain(*ways))):
            log(
                f"data: {root}: {some(sorted(alike))} look like kohya's <repeats>_<name>, and are "
                "not taken for that, since some images lie in other folders"
            )
        return {}
    numbers = sorted(int(match[1]) for match in found.values())
    names = some(sorted(match[0] for match in found.values()), 20)
    if len(numbers) > 1 and numbers == list(range(1, len(numbers) + 1)):
        log(f"data: {root}: {names} are numbered, and not taken for kohya's <repeats>_<name>")
        return {}
    log(
        f"data: {root}: {names}: read as kohya's <repeats>_<name>: how many times an epoch has "
        "each image, and the caption of those without one (--default_caption goes before it)"
    )
    return {file: (int(found[file.parent][1]), found[file.parent][2]) for file in files}


def open_data(
    data: str,
    data_class: str = "all",
    default_caption: str = "",
    selection: Selection = EVERYTHING,
    written: Iterable[Path] = (),
    cache_dir: Path = Path("data/.cache"),
) -> ImageSet:
    """Open what --data names: toy, hf:owner/name, a folder, data/NAME, or a set to be fetched.

    A zip or tar of images is a folder, too: that to which it is unpacked, in cache_dir.
    """
    if not data.removeprefix("hf:"):
        raise UserError(
            f"--data {data!r} names nothing; expected a folder, or one of its other values"
        )
    if data == "toy":
        return toy_set().only(data_class)
    roots = (Path(data), Path(os.path.expanduser(data)), Path("data") / data)
    root = next((root for root in roots if os.path.exists(root)), None)
    source = data if root is not None else NAMED.get(data, data)
    if source.startswith("hf:"):
        return hub_set(source[3:], default_caption, selection).only(data_class)
    if root is None and data in NAMED:
        root = roots[-1]
        fetch(source, root, SHA256.get(source))
    if root is None:
        raise UserError(
            f"--data {shown(data, 200)} is neither a folder, zip or tar of images, here or in "
            f"data/, nor a known set: toy, {', '.join(NAMED)}, hf:owner/name"
        )
    if not root.is_dir():
        root = unpacked(root, cache_dir)
    for folder in (root, root / "cifar-10-batches-bin"):
        if (folder / "data_batch_1.bin").is_file():
            return cifar_set(folder, selection).only(data_class)
    return folder_set(root, data_class, default_caption, selection, written)


def configured(config: Config) -> tuple:
    """Give the arguments of `open_data`, of which a run leaves out what it writes itself."""
    c = config
    written = [Path(f) for f in (c.save_folder, c.cache_dir, c.class_data) if f is not None]
    return c.data, c.data_class, c.default_caption, Selection.of(c), written, Path(c.cache_dir)
