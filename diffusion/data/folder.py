"""Which files below a folder are a data set: the scan, and the splits that folders stand for.

A scan leaves out what this program has written, what file managers put beside pictures, hidden
entries and links that lead elsewhere. `choose_split` picks train/ where a folder holds splits:

    train/cat/0.png  test/cat/1.png        or, the other way round,        cat/train/  cat/test/

Both say what they have left out.
"""

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from .. import UserError
from ..files import owned
from ..runtime.distributed import log
from .images import SUFFIXES

# folders that file systems and file managers make, in small letters; hidden ones are never read
FOREIGN = {
    "@eadir": "thumbnails of a file manager",  # Synology
    "__macosx": "a Mac's notes in an archive",
    "#recycle": "deleted files",  # Synology
    "@recycle": "deleted files",  # QNAP
    "$recycle.bin": "deleted files",  # Windows
    "#snapshot": "old versions of files",  # Synology
    "@recently-snapshot": "old versions of files",  # QNAP
    "system volume information": "files of Windows",
    "lost+found": "pieces of lost files",
}
OURS = "written by this program"
# in a run's folder: those of pictures, without any, and the suffixes of its files
RUN_PICTURES = ("samples", "images", "viz", "metrics")
RUN_OTHERS = ("checkpoints", "tensorboard")
RUN_SUFFIXES = (".pt", ".safetensors", ".json", ".jsonl")
SAMPLE = re.compile(r"step_\d{8,}\.png")
# the names that are given to pictures: numbers to sampled ones, words to all others
NUMBERED = re.compile(r"\d{5,}\.png")
NAMED = re.compile(
    r"(grid|interpolation|quality|step_\d{8}|forward|backward|interpolate_|schedule|table|curves)"
    r".*\.(png|webp)"
)
TEXTS = (".txt", ".caption")  # captions, if they stand beside an image
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLITS = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "devel": "val",
    "test": "test",
    "testing": "test",
    "tst": "test",
    "holdout": "test",
    "heldout": "test",
    "pred": "test",
}
# what stands around them: "seg_train", "Training Set", "train2017", "test_images"
SPLIT_NAME = re.compile(
    r"(?:(?:seg|images?|imgs?|data|dataset)[ _-])?(held[ _-]?out|hold[ _-]?out|[a-z]+?)"
    r"(?:[ _-]?(?:data|images?|imgs?|set|split))*(?:[ _-]?\d+)?"
)


def report(what: str, problems: list[tuple[str, str]], total: int, most: int = 20) -> None:
    """One warning that counts and names what was wrong. Names may hold anything: shown by repr."""
    if not problems:
        return
    lines = [f"  {name!r}: {reason}" for name, reason in problems[:most]]
    if len(problems) > most:
        lines.append(f"  ... and {len(problems) - most} more")
    log("\n".join([f"warning: {len(problems)} of {total} {what}:", *lines]))


def listed(counts: Iterable[tuple[str, int]], most: int = 20) -> str:
    """ "cat (3), dog (2), ... and 7 more"."""
    parts = [f"{name} ({n:,})" for name, n in counts]
    more = [f"... and {len(parts) - most} more"] if len(parts) > most else []
    return ", ".join([*parts[:most], *more])


def images_of(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


# --- the scan ------------------------------------------------------------------------------------


@dataclass
class Scan:
    """What lies below root: images, sorted; texts and tables, which may describe them.

    left_out: {(what, why): images} by folder, or by picture. others: {suffix: files}.
    outside: links that lead out of the folder.
    """

    root: Path
    images: list[Path] = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    outside: list[Path] = field(default_factory=list)

    def why_left_out(self) -> str:
        """ "left out: 3 images: ..."; empty where there are none."""
        if not self.left_out:
            return ""
        parts = [f"{n:,} in {what} ({why})" for (what, why), n in self.left_out.items()]
        more = [f"... and {len(parts) - 20} more places"] if len(parts) > 20 else []
        return f"left out: {images_of(self.left_out.total())}: {', '.join([*parts[:20], *more])}"

    def report(self) -> "Scan":
        problems = [(str(p), "not read; put a copy or a hard link there") for p in self.outside]
        total = len(self.images) + len(self.outside)
        report("entries are links that lead out of the folder", problems, total)
        if self.left_out:
            log(f"{self.root}: {self.why_left_out()}")
        return self


def scan(root: Path, sampled: bool = False) -> list[Path]:
    """Find image files below root at any depth, sorted, and say what was left out. See `walk`."""
    return walk(root, sampled=sampled).report().images


def scan_split(root: Path, split: str | None = None) -> list[Path]:
    """Find the images of a split below root (see `choose_split`), and say what was taken."""
    part = choose_split(root, scan(root), split)
    log(f"data: {root}: {part.about}")
    return part.files


def walk(root: Path, written: Iterable[Path] = (), sampled: bool = False) -> Scan:
    """Find what lies below root at any depth; link loops are cut.

    written: folders that a run writes to, left out as those which show it themselves; root itself
    is read whatever it is. Pictures that this program sampled are left out too, unless `sampled`
    says otherwise, root is a folder of such pictures, or there is nothing else.
    """
    found = Scan(root)
    seen = set()
    numbered = []
    places = {place for folder in written if (place := place_of(folder)) is not None}
    # what a run writes into a folder of images that is its own folder, too
    is_run = owned.is_run(root) or place_of(root) in places
    sampled = sampled or owned.is_marked(root)
    for folder, subfolders, files in os.walk(root, followlinks=True):
        where = Path(folder)
        if (place := place_of(where)) in seen:
            subfolders.clear()
            continue
        seen.add(place)
        entries = sorted(d for d in subfolders if not d.startswith("."))
        subfolders[:] = []
        for path in (where / name for name in entries):
            if is_run and where == root and path.name in RUN_OTHERS:
                if count := count_images(path):
                    found.left_out[f"{path.name}/", "where this run writes"] += count
                continue
            if reason := why_not(path, places):
                if count := count_images(path):
                    found.left_out[f"{path.relative_to(root)}/", reason] += count
            elif not inside(path, root):
                found.outside.append(path)
            else:
                subfolders.append(path.name)
        run_pictures = is_run and where.parent == root and where.name in RUN_PICTURES
        # class images that are added to somebody's --class_data
        numbers_count = sampled or (where == root and place_of(root) in places)
        for path in (where / name for name in files if not name.startswith(".")):
            suffix = path.suffix.lower()
            if path.name.lower() in TABLES:
                found.tables.append(path)
            elif suffix in TEXTS:
                found.texts.append(path)
            elif suffix not in SUFFIXES:
                if is_run and where == root and suffix in RUN_SUFFIXES:
                    continue
                found.others[suffix or path.name] += 1
            elif not inside(path, root):
                found.outside.append(path)
            elif NUMBERED.fullmatch(path.name) and (run_pictures or not numbers_count):
                (numbered if owned.is_our_picture(path) else found.images).append(path)
            elif is_ours(path, run_pictures):
                what = f"{where.relative_to(root)}/" if run_pictures else path.relative_to(root)
                found.left_out[str(what), OURS] += 1
            else:
                found.images.append(path)
    if not found.images and not found.left_out and not is_run:
        found.images = numbered
    else:
        for path in numbered:
            found.left_out[f"{path.parent.relative_to(root)}/", OURS] += 1
    found.images.sort(key=os.fsencode)
    found.texts.sort(key=os.fsencode)
    found.tables.sort(key=os.fsencode)
    return found


def place_of(path: Path) -> tuple[int, int] | None:
    """What is the same for all names of a file or folder; None where there is none."""
    try:
        where = os.stat(path)
    except OSError:
        return None
    return where.st_dev, where.st_ino


def why_not(folder: Path, places: set = frozenset()) -> str | None:
    """The reason why a folder of pictures is left out; None if it is not."""
    if reason := FOREIGN.get(folder.name.lower()):
        return reason
    if place_of(folder) in places:
        return "where this run writes"
    if owned.is_marked(folder):
        return f"{OURS}, says {owned.marker_of(folder).name} beside it"
    return OURS if owned.is_ours(folder) else None


def is_ours(file: Path, in_run: bool) -> bool:
    """Whether this program wrote a picture; only asked of names and places that it writes to."""
    if in_run and file.parent.name == "samples" and SAMPLE.fullmatch(file.name):
        return True
    return (in_run or NAMED.fullmatch(file.name) is not None) and owned.is_our_picture(file)


def count_images(folder: Path) -> int:
    files = (name for _, _, names in os.walk(folder) for name in names)
    return sum(Path(n).suffix.lower() in SUFFIXES and not n.startswith(".") for n in files)


def inside(path: Path, root: Path) -> bool:
    """Whether what is read there lies below root: a set from elsewhere may link to anything."""
    if not path.is_symlink():
        return True  # its folder has been asked
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


# --- splits --------------------------------------------------------------------------------------


@dataclass
class Part:
    """The images of one split, or all. base: what their names are relative to.

    classes: of each image the first folder on its way that is no split, or behind the only split
        there is; None where there is none.
    about: what was taken for what.
    """

    base: Path
    files: list[Path]
    classes: list[str | None]
    about: str


def choose_split(root: Path, files: list[Path], split: str | None = None) -> Part:
    """Take the train split where there are splits, or the one that is named; "all" takes all.

    Splits are known by their names (SPLITS, SPLIT_NAME), in capitals or not. train/ is taken for
    one if another split stands beside it, or nothing but images; else it is a class. Raises
    UserError if there are splits without the one in question.
    """
    ways = [file.relative_to(root).parts for file in files]
    depth, points = find_splits(ways, split)
    if split not in (None, "all") and not points:
        tops = Counter(way[0] for way in ways if len(way) > 1)
        there = listed((f"{name}/", n) for name, n in sorted(tops.items())) or "no folders"
        raise UserError(f"--split {split}: no folder of {root} is this split; it holds {there}")
    if not points:
        classes = [way[0] if len(way) > 1 else None for way in ways]
        return Part(root, files, classes, images_of(len(files)) + doubtful(ways))
    whole = kind_of(split or "train") == "train"  # folders without splits are trained on
    inside_splits: dict[tuple, set] = {}
    for way in ways:
        if way[:depth] in points and len(way) > depth + 1:
            below = way[depth + 1] if len(way) > depth + 2 else None
            inside_splits.setdefault(way[: depth + 1], set()).add(below)
    # one place with splits and folders in them: what is above is a wrapper, and no class
    chosen = [(*point, name) for point, names in points.items() for name in names]
    wrapped = len(points) == 1 and any(inside_splits.get(c, {None}) != {None} for c in chosen)
    whole = whole and not wrapped
    taken = []
    classes = []
    others = Counter()
    for file, way in zip(files, ways):
        names = points.get(way[:depth], [])
        folder = way[depth] if len(way) > depth + 1 else None  # where the split's name stands
        if (
            split == "all"
            or folder in names
            or (whole and way[:depth] not in points and way[depth:])
        ):
            rest = way
            if folder in names and wrapped:
                again = is_again(folder, inside_splits[way[: depth + 1]])
                rest = way[depth + 1 + again :]
            elif folder in names:
                rest = way[:depth] + way[depth + 1 :]
            taken.append(file)
            classes.append(rest[0] if len(rest) > 1 else None)
        else:
            where = way[: depth + 1] if folder else way[:-1]
            beside = not folder and any(where == point[: len(where)] for point in points)
            others["images beside them" if beside else "/".join(where) + "/"] += 1
    if split == "all":
        return Part(root, taken, classes, f"{images_of(len(taken))} of all splits")
    chosen = ["/".join(folder) for folder in chosen]
    about = f"{split or 'train'} split {listed_folders(chosen)} ({images_of(len(taken))})"
    if others:
        about += f"; not used: {listed(sorted(others.items()))}"
    return Part(root / chosen[0] if depth == 0 or wrapped else root, taken, classes, about)


def is_again(name: str, below: set[str | None]) -> bool:
    """Whether all that a split holds is a folder of the same split, as in seg_train/seg_train/."""
    (only, *more) = below
    return not more and only is not None and kind_of(only) == kind_of(name) is not None


def find_splits(ways: list[tuple], split: str | None) -> tuple[int, dict[tuple, list[str]]]:
    """(depth, {folder at this depth: its subfolders that are the wanted split}); {} without.

    The folders are tuples of names. Those nearest to the root count.
    """
    below: dict[tuple, set[str]] = {}
    for way in ways:
        for i in range(len(way) - 1):
            below.setdefault(way[:i], set()).add(way[i])
    for depth in sorted({len(folder) for folder in below}):
        level = {folder: names for folder, names in below.items() if len(folder) == depth}
        deep = [way for way in ways if len(way) > 1]
        kinds = {kind_of(way[depth]) if len(way) > depth + 1 else None for way in deep}
        if depth and split is None and kinds and kinds <= {"val", "test"}:
            no_train("/".join((*f, name)) for f, names in level.items() for name in names)
        # cat/train/ beside dog/test/
        apart = depth and split is None and None not in kinds and kinds > {"train"}
        if not apart and not any(is_split(f, names, split) for f, names in level.items()):
            continue
        points = {
            folder: wanted(names, split)
            for folder, names in level.items()
            if any(kind_of(n) for n in names) or wanted(names, split)
        }
        for folder, names in points.items():
            if len(names) > 1 and split != "all":
                several = listed_folders(["/".join((*folder, name)) for name in names])
                raise UserError(
                    f"several folders are the {split or 'train'} split: {several}; "
                    "name one with --split"
                )
        return depth, points
    return 0, {}


def is_split(folder: tuple, names: set[str], split: str | None) -> bool:
    """Whether these subfolders are splits of a folder."""
    kinds = {kind_of(name) for name in names}
    if split not in (None, "all"):
        return bool(wanted(names, split))
    if folder == () and None not in kinds:  # nothing but splits, and perhaps images
        if split is None and "train" not in kinds:
            no_train(names)
        return True
    return "train" in kinds and bool(kinds & {"val", "test"})


def no_train(folders: Iterable[str]) -> None:
    """Raise UserError where all folders are other splits."""
    folders = sorted(folders)
    raise UserError(
        f"there is no train split, only {listed_folders(folders)}: --split "
        f"{shlex.quote(folders[0].split('/')[-1])} uses it, --split all all there is"
    )


def wanted(names: set[str], split: str | None) -> list[str]:
    """Those of a folder's subfolders that are the split: of this very name, or of this kind."""
    if split == "all":
        return sorted(name for name in names if kind_of(name))
    if split in names:
        return [split]
    split = split or "train"
    kind = kind_of(split) or split.lower()
    return sorted(name for name in names if kind in (kind_of(name), name.lower()))


@lru_cache(maxsize=4096)
def kind_of(name: str) -> str | None:
    """Name the split that a folder's name means: train, val or test; None for what is none."""
    found = SPLIT_NAME.fullmatch(name.strip().lower())
    return SPLITS.get(re.sub("[ _-]", "", found[1])) if found else None


def doubtful(ways: list[tuple]) -> str:
    """What to say where a class, or a folder inside one, has a split's name."""
    said = ""
    folders = {way[:i] for way in ways for i in range(1, len(way))}
    if names := sorted(f[0] for f in folders if len(f) == 1 and kind_of(f[0])):
        said += (
            f"; {listed_folders(names)} taken for a class, as other folders stand beside it "
            f"(--split {shlex.quote(names[0])} uses it alone)"
        )
    inner = [f for f in folders if len(f) > 1 and kind_of(f[-1]) in ("val", "test")]
    if inner:
        said += f"; {listed_folders(sorted(map('/'.join, inner)))} used, too: no train split there"
    return said


def listed_folders(names: list[str], most: int = 5) -> str:
    return ", ".join(f"{name}/" for name in names[:most]) + (", ..." if len(names) > most else "")
