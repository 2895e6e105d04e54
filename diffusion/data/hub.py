"""Sets of the Hugging Face hub: which split and which of its columns are used.

Columns are named by --image_column and --caption_column, or known by their names and types; where
several could be meant, it is an error that lists them. Values may be null: such a row has no image,
no label or no caption.
"""

import contextlib
from pathlib import Path

import numpy as np

from .. import UserError, shown, some
from ..files.atomic import blame
from ..runtime.distributed import log
from .captions import CAPTION_COLUMNS, EVERYTHING, Selection, texts_of
from .folder import is_inside
from .image_set import ImageSet, digest
from .images import BadImage, read_image

IMAGE_COLUMNS = "image img jpg jpeg png webp".split()  # where several hold images
LABEL_COLUMNS = "label labels class category".split()


class HubSet:
    """Opens a split of the hub, images left encoded: its rows, and which columns are used.

    image, text, label: columns, the last two or None. classes: names of the labels; numbers: of
    the classes, by what stands for them in the column. key: part of the image cache's, where
    another split or column could be meant. Raises UserError where columns are not clear.
    """

    def __init__(
        self,
        path: str,
        streaming: bool,
        selection: Selection = EVERYTHING,
        default_caption: str = "",
    ):
        try:
            import datasets
            from huggingface_hub.constants import HF_HUB_CACHE
        except ImportError:
            raise UserError(
                f"--data hf:{path} needs the datasets library: pip install datasets"
            ) from None
        self.path = path
        self.name = f"hf:{path}"
        self.default_caption = default_caption
        self.read_captions = selection.captions
        data, split = _load(datasets, path, streaming, selection.split)
        features = data.features or {}
        selection.check(features, self.name)
        images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
        named = [n for n in IMAGE_COLUMNS if n in images]
        asked = selection.image_column
        choices = [asked] if asked is not None else named[:1] or images
        if len(choices) != 1 or choices[0] not in images:
            raise UserError(
                f"--image_column {asked or 'is needed'}: {self.name} holds images in "
                f"{some(images, 20) or 'none'} of its columns {some(features, 20)}"
            )
        self.image = choices[0]
        self.text = selection.caption_column or next(
            (n for n in CAPTION_COLUMNS if n in features), None
        )
        labels = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
        self.label = next((n for n in (*LABEL_COLUMNS, *labels) if n in labels), None)
        self.classes = []
        if self.label:
            self.classes = features[self.label].names
            self.numbers = {i: i for i in range(len(self.classes))}
        elif not streaming:
            self._plain_labels(data, features)
        log(
            f"data: {self.name}: split {split}, images from column {self.image}, "
            f"captions from {self.text or 'no column'}, labels from {self.label or 'no column'} "
            f"({len(self.classes)} classes)"
        )
        self.data = data.cast_column(self.image, datasets.Image(decode=False))
        # what rows may name: files of the set's own folder, or that the library has fetched
        own = [path] if Path(path).is_dir() else [datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE]
        self.folders = list(map(Path, own))
        self.key = (split, self.image)

    def pixels(self, row: dict, size: int, note=None) -> np.ndarray:
        """Read a row's image: (size, size, 3) uint8. Raises BadImage for what is none, null too."""
        value = row[self.image] or {"bytes": None, "path": None}
        if value["bytes"] is not None:
            return read_image(value["bytes"], size, note)
        if value["path"] is None:
            raise BadImage("the row has no image")
        path = Path(value["path"])
        if not any(is_inside(path, folder) for folder in self.folders):
            raise BadImage(f"the row names {shown(str(path), 200)}, a file outside of the set")
        return read_image(path, size, note)

    def captions_of(self, row: dict, number: int) -> tuple[str, ...]:
        """Find a row's captions, at least one. Raises UserError for what is no caption."""
        texts = ()
        if self.text and self.read_captions:
            texts = texts_of(row[self.text], f"{self.name}, row {number}, column {self.text}")
        return texts or (self.default_caption,)

    def label_of(self, row: dict) -> int:
        """Find a row's class, -1 for none. Raises UserError for what is no class."""
        value = row[self.label] if self.label else None
        if _unlabelled(value):
            return -1
        if value not in self.numbers:
            raise UserError(
                f"{self.name}: column {self.label} holds {shown(value)}, none of its "
                f"{len(self.classes)} classes"
            )
        return self.numbers[value]

    def _plain_labels(self, data, features) -> None:
        """Take a column of texts or whole numbers that is named like labels."""
        for name in LABEL_COLUMNS:
            kind = getattr(features.get(name), "dtype", "")
            if kind.startswith(("string", "large_string", "bool", "int", "uint")):
                found = sorted(v for v in data.unique(name) if not _unlabelled(v))
                self.label = name
                self.classes = [str(v) for v in found]
                self.numbers = {v: i for i, v in enumerate(found)}
                return


def hub_set(path: str, default_caption: str, selection: Selection) -> ImageSet:
    """Download a split of a hub set (or open a local folder of parquet files)."""
    hub = HubSet(path, False, selection, default_caption)
    data = hub.data
    used = [column for column in (hub.text, hub.label) if column]
    rows = data.select_columns(used) if used else [{}] * len(data)
    texts = [hub.captions_of(row, i) for i, row in enumerate(rows)]
    return ImageSet(
        name=hub.name,
        names=[f"{path}/{i:08d}" for i in range(len(data))],
        read=lambda i, size, note=None: hub.pixels(data[i], size, note),
        labels=[hub.label_of(row) for row in rows],
        classes=hub.classes,
        texts=texts if any(own[0] for own in texts) else None,
        stamp=digest(*(f["filename"] for f in data.cache_files), len(data), *hub.key),
    )


def _unlabelled(value) -> bool:
    """Check for null, blank, or the -1 that the hub's sets have for none."""
    return value in (None, -1) or (isinstance(value, str) and not value.strip())


def _load(datasets, path: str, streaming: bool, split: str | None):
    """Load (rows, the split's name): the one asked for, else train, else the only one."""
    name = split or "train"
    advice = (
        "; check the name and the network (or set HF_ENDPOINT to a mirror), or give --data a "
        "folder of images"
    )
    with blame(f"hf:{path} could not be loaded", advice), contextlib.redirect_stdout(None):
        try:
            return datasets.load_dataset(path, split=name, streaming=streaming), name
        except ValueError:
            names = [str(name) for name in datasets.get_dataset_split_names(path)]
            if not names or name in names:
                raise
    if split is None and len(names) == 1:
        return _load(datasets, path, streaming, names[0])
    raise UserError(f"hf:{path} has no split {name}; --split takes one of {', '.join(names)}")
