"""Read batches of the images of a folder, and collect what is computed of batches.

Each rank reads or samples some of the images. What is computed of them meets on rank 0, in the
order of the images' numbers, so that the number of ranks does not matter.
A batch is as `pictures.samples.sample_batches` makes it, of images of one size: their numbers in
the set, options with their prompts if these are known, and pixels (b, H, W, 3) uint8.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import UserError
from ..data.folder import report
from ..data.images import BadImage, read_image
from ..runtime.distributed import gather_object, progress, rank, world_size

Batch = tuple[Sequence[int], dict, np.ndarray]


def folder_batches(
    folder: Path, files: Sequence[Path], size: int | None, prompts: Sequence[str] | None = None
) -> Iterator[Batch]:
    """Read this rank's images of a folder, and report in the end those that cannot be read.

    size: cut and resize to it as training does; None: as they are.
    """
    own = range(len(files))[rank() :: world_size()]
    bad = []
    for start in progress(range(0, len(own), 64), desc=folder.name, leave=False):
        groups = {}  # by shape
        for i in own[start : start + 64]:
            try:
                image = read_image(files[i], size)
                groups.setdefault(image.shape, []).append((i, image))
            except BadImage as error:
                bad.append((files[i], str(error)))
        for numbers, images in (zip(*group) for group in groups.values()):
            yield numbers, {"prompts": prompts and [prompts[i] for i in numbers]}, np.stack(images)
    every = sorted(sum(gather_object(bad) or [], []))  # on rank 0
    report(f"images of {folder} cannot be used and are skipped", every, len(files))


def collect(
    batches: Iterable[Batch], compute: Callable[..., dict[str, Tensor]], source
) -> dict[str, Tensor] | None:
    """Apply compute(*batch) to this rank's batches; return all ranks' rows on rank 0, else None.

    compute: returns named tensors with a row for each image, or for the first images of the batch.
    Raises UserError if there are no images, or if rows differ in shape, as the images then do.
    """
    ranks = gather_object([(list(batch[0]), compute(*batch)) for batch in batches])
    if ranks is None:
        return None
    found = sum(ranks, [])
    if not found:
        raise UserError(f"no images of {source} can be used")
    rows = {}
    for name in found[0][1]:
        parts = [own[name] for _, own in found]
        if len({part.shape[1:] for part in parts}) > 1:
            raise UserError(f"the images of {source} differ in size; give --size N")
        order = np.argsort([n for numbers, own in found for n in numbers[: len(own[name])]])
        rows[name] = torch.cat(parts)[order]
    return rows
