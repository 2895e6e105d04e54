"""A set of the Hugging Face hub: which split and which of its columns are used.

Columns are named by --image_column and --caption_column, or known by their names and types; where
several could be meant, it is an error that lists them. Values may be null: such a row has no image,
no label or no caption.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import UserError
from ..runtime.distributed import log
from .captions import CAPTION_COLUMNS, Selection, shortened, texts_of
from .images import BadImage, read_image

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")  # where several hold images
LABEL_COLUMNS = ("label", "labels", "class", "category")


@dataclass(frozen=True)
class HubSet:
    """A split of the hub, images left encoded: its rows, and which columns are used.

    classes: names of the labels; values: what stands for them in the column, where it is not their
    number. key: part of the image cache's, where another split or column could be meant. strict:
    whether captions are used, so that one which is none is an error.
    """

    path: str
    data: object
    split: str
    image: str
    text: str | None
    label: str | None
    classes: list[str]
    values: dict | None
    default_caption: str
    key: tuple[str, ...]
    strict: bool

    def pixels(self, row: dict, size: int) -> np.ndarray:
        """(size, size, 3) uint8. Raises BadImage for what is none, null too."""
        value = row[self.image]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise BadImage("the row has no image")
        source = value["bytes"] if value["bytes"] is not None else Path(value["path"])
        return read_image(source, size)

    def captions(self, value, row: int | str) -> tuple[str, ...]:
        """Of a row: at least one. Raises UserError for what is no caption."""
        texts = texts_of(value, f"hf:{self.path}, row {row}, column {self.text}")
        return texts or (self.default_caption,)

    def number(self, value) -> int:
        """A row's class, -1 for none. Raises UserError for what is no class."""
        if unlabelled(value):
            return -1
        number = self.values.get(value) if self.values is not None else value
        if number is None or not 0 <= number < len(self.classes):
            raise UserError(
                f"hf:{self.path}: column {self.label} holds {shortened(value)}, none "
                f"of its {len(self.classes)} classes"
            )
        return number


def open_hub(
    path: str, streaming: bool, selection: Selection | None = None, default_caption: str = ""
) -> HubSet:
    """A split through the datasets library. Raises UserError where columns are not clear."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--data hf:{path} needs the datasets library: pip install datasets"
        ) from None
    selection = selection or Selection()
    data, split = _load(datasets, path, streaming, selection.split)
    features = data.features or {}
    images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
    image = _column("image_column", selection.image_column, path, features)
    named = [name for name in IMAGE_COLUMNS if name in images]
    if image is None and not images:
        raise UserError(f"hf:{path} has no image column; its columns are {', '.join(features)}")
    if image is None and len(images) > 1 and not named:
        raise UserError(
            f"hf:{path} has several image columns: {', '.join(images)}; name one with "
            "--image_column"
        )
    image = image or (named or images)[0]
    if image not in images and not _encoded(datasets, features[image]):
        raise UserError(
            f"--image_column {image}: hf:{path} holds {features[image]} there; "
            f"columns of images are {', '.join(images) or 'none'}"
        )
    text = _column("caption_column", selection.caption_column, path, features)
    text = text or next((n for n in CAPTION_COLUMNS if n in features), None)
    labels = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
    label = next((n for n in LABEL_COLUMNS if n in labels), (labels or [None])[0])
    classes, values = (features[label].names, None) if label else ([], None)
    if label is None and not streaming:
        label, classes, values = _labels(data, features)
    log(
        f"data: hf:{path}: split {split}, images from column {image}, "
        f"captions from {text or 'no column'}, labels from {label or 'no column'}"
        + (f" ({len(classes)} classes)" if label else "")
    )
    data = data.cast_column(image, datasets.Image(decode=False))
    # before there was a choice, the first column of the train split was read
    key = () if (split, image) == ("train", (images or [None])[0]) else (split, image)
    return HubSet(
        path,
        data,
        split,
        image,
        text,
        label,
        classes,
        values,
        default_caption,
        key,
        selection.captions,
    )


def unlabelled(value) -> bool:
    """Whether a label is null, blank, or the -1 that the hub's sets have for none."""
    return value is None or value == -1 or (isinstance(value, str) and not value.strip())


def _load(datasets, path: str, streaming: bool, split: str | None):
    """(rows, the split's name): the one asked for, else train, else the only one."""
    try:
        with contextlib.redirect_stdout(None):
            try:
                name = split or "train"
                return datasets.load_dataset(path, split=name, streaming=streaming), name
            except ValueError:
                names = [str(name) for name in datasets.get_dataset_split_names(path)]
                if not names or name in names:
                    raise
            if split is None and len(names) == 1:
                return datasets.load_dataset(path, split=names[0], streaming=streaming), names[0]
    except Exception as error:  # anything from the network to the repository's files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"hf:{path} could not be loaded: {reason}; check the name and the network (or set "
            "HF_ENDPOINT to a mirror), or give --data a folder of images"
        ) from None
    raise UserError(f"hf:{path} has no split {name}; --split takes one of {', '.join(names)}")


def _column(option: str, name: str | None, path: str, features) -> str | None:
    if name is not None and name not in features:
        raise UserError(
            f"--{option} {name}: hf:{path} has no such column; its columns are "
            f"{', '.join(features)}"
        )
    return name


def _encoded(datasets, feature) -> bool:
    """Whether a column may hold the bytes of image files."""
    if isinstance(feature, dict):
        return {"bytes", "path"} <= feature.keys()
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _labels(data, features) -> tuple:
    """(column, class names, {value: number}) of a column of texts or whole numbers named label."""
    for name in LABEL_COLUMNS:
        kind = getattr(features.get(name), "dtype", "")
        if kind in ("string", "large_string", "bool") or kind.startswith(("int", "uint")):
            found = sorted(v for v in data.unique(name) if not unlabelled(v))
            return name, [str(v) for v in found], {v: i for i, v in enumerate(found)}
    return None, [], None
