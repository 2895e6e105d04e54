"""Which files below a folder are a data set: the scan, and the splits that folders stand for.

A scan leaves out what this program has written, what file managers put beside pictures, and hidden
entries. Links are followed, but for texts and tables that lead out of the folder, whose words end
up in models and pictures: those only to texts and tables that are named after, and lie beside,
images of the set, or to the store of the hub's snapshot that the folder is. `choose_split` picks
train/ where a folder holds splits:

    train/cat/0.png  test/cat/1.png        or, the other way round,        cat/train/  cat/test/

Both say what they have left out.
"""

import contextlib
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .. import UserError, shown, some
from ..files import owned
from ..files.atomic import reason
from ..runtime.distributed import log
from .images import SUFFIXES

# folders that file systems and file managers make, in small letters; hidden ones are never read
FOREIGN = (
    "@eadir|#recycle|#snapshot"  # Synology
    "|@recycle|@recently-snapshot"  # QNAP
    "|$recycle.bin|system volume information"  # Windows
    "|__macosx|lost+found"
).split("|")
MANAGED = "of a file manager or system"
OURS = "written by this program"
RUNS = "where this run writes"
RUN_PICTURES = ("samples", "images", "viz", "metrics")  # in a run's folder
# the names that are given to pictures: numbers to sampled ones, words to all others
NUMBERED = re.compile(r"\d{5,}\.png")
NAMED = re.compile(
    r"(grid|interpolation|quality|step_\d{8}|forward|backward|interpolate_|schedule|table|curves)"
    r".*\.(png|webp)"
)
TEXTS = (".txt", ".caption")  # captions, if they stand beside an image
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
LEVELS = 16  # of folders in which splits are looked for
# splits, and what stands around them: "seg_train", "Training Set", "train2017", "test_images"
SPLIT_NAME = re.compile(
    r"(?:(?:seg|images?|imgs?|data|dataset)[ _-])?"
    r"(?:(?P<train>train|training|trn)|(?P<val>val|valid|validation|dev|devel|eval|evaluation)"
    r"|(?P<test>test|testing|tst|hold[ _-]?out|held[ _-]?out|pred))"
    r"(?:[ _-]?(?:data|images?|imgs?|set|split))*(?:[ _-]?\d+)?"
)


def counted(counts: Mapping[str, int]) -> str:
    """Write counts as "cat (3), dog (2) ...", in the order of the names."""
    return some((f"{name} ({counts[name]:,})" for name in sorted(counts, key=os.fsencode)), 20)


def report(what: str, problems: list[tuple], total: int) -> None:
    """Count and name in one warning what was wrong: (name, why). Names may hold anything."""
    if problems:
        lines = [f"\n  {shown(str(name), 200)}: {why:.1000}" for name, why in problems[:20]]
        more = "\n  ..." if len(problems) > 20 else ""
        log(f"warning: {len(problems)} of {total} {what}:{''.join(lines)}{more}")


# --- the scan ------------------------------------------------------------------------------------


class Scan:
    """Lists what lies below root: images, sorted; texts and tables, which may describe them.

    left_out: {(what, why): images} by folder, or by picture. others: {suffix: files}.
    outside: {what lies, by a link, outside of root: where}. problems: folders that cannot be read
        or were read, and texts that are not followed, with the reason.
    """

    def __init__(self, root: Path):
        self.root = root
        self.images = []
        self.texts = []
        self.tables = []
        self.left_out = Counter()
        self.others = Counter()
        self.outside = {}
        self.problems = []

    def why_left_out(self) -> str:
        parts = (f"{n:,} in {what} ({why})" for (what, why), n in self.left_out.items())
        return f"left out: {self.left_out.total():,} images: {some(parts, 20) or 'none'}"

    def report(self) -> "Scan":
        if self.left_out:
            log(f"{self.root}: {self.why_left_out()}")
        if count := len(self.outside.keys() & set(self.images)):
            log(f"{self.root}: links lead out of the folder to {count:,} of its images")
        report("folders and texts are not read", self.problems, len(self.problems))
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
    says otherwise, root is a folder of such pictures or written to, or there is nothing else.
    """
    found = Scan(root)
    ours = []
    numbered = []
    seen = set()
    excluded = {inode_of(folder) for folder in written} - {None}
    # what a run writes into a folder of images that is its own folder, too
    is_written = inode_of(root) in excluded
    is_run = is_written or owned.is_run(root)
    sampled = sampled or is_written or owned.is_marked(root)
    home = Path(os.path.realpath(root))
    pending = [(root, False)]
    while pending:
        where, is_outside = pending.pop()
        if inode_of(where) in seen:
            found.problems.append((where, "was read under another name, or leads to itself"))
            continue
        seen.add(inode_of(where))
        folders, files = _listing(where, found.problems)
        for entry in reversed(folders):
            path = where / entry.name
            why = why_not(path, excluded)
            if not why:
                leads_out = is_outside if not entry.is_symlink() else not is_inside(path, home)
                pending.append((path, leads_out))
            elif count := count_images(path):
                found.left_out[f"{path.relative_to(root)}/", why] += count
        run_pictures = is_run and where.parent == root and where.name in RUN_PICTURES
        for entry in files:
            path = where / entry.name
            if is_outside or (entry.is_symlink() and not is_inside(path, home)):
                found.outside[path] = Path(os.path.realpath(path))
            suffix = path.suffix.lower()
            if path.name.lower() in TABLES:
                found.tables.append(path)
            elif suffix in TEXTS:
                found.texts.append(path)
            elif suffix not in SUFFIXES:
                found.others[suffix or path.name] += 1
            else:
                number = NUMBERED.fullmatch(path.name)
                named = run_pictures or NAMED.fullmatch(path.name) or (number and not sampled)
                is_ours = named and owned.is_our_picture(path)
                (found.images if not is_ours else numbered if number else ours).append(path)
    if found.images or found.left_out or ours or is_run:
        ours += numbered
    else:
        found.images = numbered
    for path in ours:
        found.left_out[f"{path.parent.relative_to(root)}/", OURS] += 1
    _withhold(found, home)
    for paths in (found.images, found.texts, found.tables):
        paths.sort(key=os.fsencode)
    return found


def _listing(folder: Path, problems: list) -> tuple[list[os.DirEntry], list[os.DirEntry]]:
    """List the folders and files of a folder, by name; links are what they lead to."""
    kinds = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: os.fsencode(e.name)):
                is_folder = False
                with contextlib.suppress(OSError):  # a link to itself
                    is_folder = entry.is_dir()
                if not entry.name.startswith("."):
                    kinds[not is_folder].append(entry)
    except OSError as error:
        problems.append((folder, reason(error)))
    return kinds


def _withhold(found: Scan, home: Path) -> None:
    """Leave out texts and tables elsewhere that are not seen to belong to the images."""
    blobs = [folder.parent / "blobs" for folder in home.parents if folder.name == "snapshots"]
    known = set()
    for path in found.outside.keys() & set(found.images):
        real = found.outside[path]
        if real.suffix.lower() in SUFFIXES and real.is_file():
            known |= {(real.parent, name) for name in (real.stem, real.name, "metadata")}

    def belongs(path):
        real = found.outside.get(path)
        if real is None or real.parent in blobs:
            return True
        is_named = real.suffix.lower() in TEXTS or real.name.lower() in TABLES
        return is_named and (real.parent, real.stem) in known

    for paths in (found.texts, found.tables):
        for path in itertools.filterfalse(belongs, paths):
            why = f"a link to {found.outside[path]}, named after no image of the set: copy it here"
            found.problems.append((path, why))
        paths[:] = filter(belongs, paths)


def is_inside(path: Path, folder: Path) -> bool:
    """Check that no link leads from a path to outside of a folder."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def inode_of(path: Path) -> tuple[int, int] | None:
    """Find what all names of a file or folder have in common; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def why_not(folder: Path, excluded: set = frozenset()) -> str | None:
    """Give the reason why a folder of pictures is left out; None if it is not."""
    if folder.name.lower() in FOREIGN:
        return MANAGED
    if inode_of(folder) in excluded:
        return RUNS
    with contextlib.suppress(OSError):  # of a path that is too long, which the listing names
        return OURS if owned.is_ours(folder) else None
    return None


def count_images(folder: Path) -> int:
    count = 0
    pending = [folder]
    while pending:
        folders, files = _listing(pending.pop(), [])
        pending += [Path(entry.path) for entry in folders if not entry.is_symlink()]
        count += sum(Path(entry.name).suffix.lower() in SUFFIXES for entry in files)
    return count


# --- splits --------------------------------------------------------------------------------------


@dataclass
class Part:
    """Lists the images of one split, or all. base: what their names are relative to.

    classes: of each image the first folder on its way that is no split, or behind the only split
        there is; None where there is none.
    about: what was taken for what.
    """

    base: Path
    files: list[Path]
    classes: list[str | None]
    about: str


def choose_split(root: Path, files: list[Path], split: str | None) -> Part:
    """Take the train split where there are splits, or the one that is named; "all" takes all.

    Splits are known by their names (SPLIT_NAME), in capitals or not. train/ is taken for
    one if another split stands beside it, or nothing but images; else it is a class. Raises
    UserError if there are splits without the one in question.
    """
    ways = [file.relative_to(root).parts for file in files]
    depth, points = find_splits(ways, split)
    if not points:
        folders = {way[:i] for way in ways for i in range(1, min(len(way), LEVELS))}
        if split not in (None, "all"):
            there = listed_folders(f for f in folders if len(f) == 1) or "no folders"
            raise UserError(f"--split {split}: no folder of {root} is this split; it holds {there}")
        about = f"{len(files):,} images"
        if unsplit := listed_folders(f for f in folders if kind_of(f[-1])):
            about += f"; {unsplit} used as other folders are (--split NAME takes one alone)"
        return Part(root, files, [_first_folder(way) for way in ways], about)
    chosen = [(*point, name) for point, names in points.items() for name in names]
    below = {folder: set() for folder in chosen}  # None: images
    for way in ways:
        if way[: depth + 1] in below:
            below[way[: depth + 1]].add(_first_folder(way[depth + 1 :]))
    # one place with splits and folders in them: what is above is a wrapper, and no class
    wrapped = len(points) == 1 and any(below[folder] - {None} for folder in chosen)
    # folders without splits are trained on
    others_too = kind_of(split or "train") == "train" and not wrapped
    taken = []
    classes = []
    unused = Counter()
    for file, way in zip(files, ways):
        here = way[: depth + 1]
        if here in below:
            # a split may hold nothing but a folder of the same split: seg_train/seg_train/
            again = {kind_of(name or "") for name in below[here]} == {kind_of(here[-1])} - {None}
            above = () if wrapped else way[:depth]
            classes.append(_first_folder(above + way[depth + 1 + (wrapped and again) :]))
        elif split == "all" or (others_too and way[:depth] not in points and len(way) > depth):
            classes.append(_first_folder(way))
        else:
            unused["/".join(way[:-1][: depth + 1] or ".") + "/"] += 1
            continue
        taken.append(file)
    about = f"{split or 'train'} split {listed_folders(chosen)} ({len(taken):,} images)"
    if unused:
        about += f"; not used: {counted(unused)}"
    one = split != "all" and (depth == 0 or wrapped)
    return Part(root.joinpath(*chosen[0]) if one else root, taken, classes, about)


def _first_folder(way: tuple[str, ...]) -> str | None:
    return way[0] if len(way) > 1 else None


def find_splits(ways: list[tuple], split: str | None) -> tuple[int, dict[tuple, list[str]]]:
    """Find (depth, {folder at this depth: its subfolders that are the wanted split}); {} without.

    The folders are tuples of names. Those nearest to the root count.
    """
    deep = [way for way in ways if len(way) > 1]
    for depth in range(min(LEVELS, max(map(len, deep), default=1) - 1)):
        level = defaultdict(set)
        for way in deep:
            if len(way) > depth + 1:
                level[way[:depth]].add(way[depth])
        points = {folder: wanted(names, split) for folder, names in level.items()}
        found = any(points.values())
        if split in (None, "all"):
            kinds = {kind_of(way[depth]) if len(way) > depth + 1 else None for way in deep}
            if split is None and kinds <= {"val", "test"}:
                folders = listed_folders((*f, name) for f in level for name in level[f])
                raise UserError(
                    f"there is no train split, only {folders}: --split test (or val) uses one, "
                    "--split all all there is"
                )
            # nothing but splits: train/, perhaps with others, or cat/train/ beside dog/test/
            apart = depth == 0 or (split is None and kinds > {"train"})
            beside = any(set(map(kind_of, names)) - {None} > {"train"} for names in level.values())
            found = beside or (apart and None not in kinds)
        if not found:
            continue
        for folder, names in points.items():
            if len(names) > 1 and split != "all":
                raise UserError(
                    f"several folders are the {split or 'train'} split: "
                    f"{listed_folders((*folder, name) for name in names)}; name one with --split"
                )
        return depth, {f: points[f] for f in points if points[f] or any(map(kind_of, level[f]))}
    return 0, {}


def wanted(names: set[str], split: str | None) -> list[str]:
    """Find the subfolders that are the split: of this very name, or of this kind."""
    if split == "all":
        return sorted(filter(kind_of, names))
    if split in names:
        return [split]
    split = split or "train"
    kind = kind_of(split) or split.lower()
    return sorted(name for name in names if kind in (kind_of(name), name.lower()))


@lru_cache(maxsize=4096)
def kind_of(name: str) -> str | None:
    """Name the split that a folder's name means: train, val or test; None for what is none."""
    found = SPLIT_NAME.fullmatch(name.strip().lower())
    return found and found.lastgroup


def listed_folders(folders: Iterable[tuple[str, ...]]) -> str:
    return some(sorted("/".join(folder) + "/" for folder in folders), 5)
