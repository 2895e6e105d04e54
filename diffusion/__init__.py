"""Image diffusion in plain PyTorch: train, sample, look, measure.

pipeline = diffusion.load("results/model.pt")
images = pipeline.sample(range(16), steps=50)          # (16, 3, H, W) in [-1, 1]
"""

import itertools
import reprlib

__version__ = "0.1.0"


class UserError(ValueError):
    """Report a mistake of the user's in one line: what was got, what was expected, what to do.

    The scripts print it without a traceback; in a notebook it is an ordinary ValueError.
    """


def shown(value, limit: int = 80) -> str:
    """Show a value that a file holds, for a message: bounded, on one line, without control codes.

    Texts are shown as Python writes them, everything else by its first items.
    """
    short = reprlib.Repr()
    short.maxlevel = 3
    short.maxstring = short.maxother = limit
    text = short.repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def some(names, count: int = 3) -> str:
    """Show the first few of some names that a file holds, without quotes."""
    first = [shown(str(name), 100)[1:-1] for name in itertools.islice(names, count + 1)]
    return ", ".join(first[:count]) + (" ..." if len(first) > count else "")


def printable(text: str) -> str:
    """Replace what a terminal would obey, or could not show, by Python's escapes.

    Line ends and tabs stay: a message of several lines is ours, and `shown` leaves none in theirs.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def load(path, weights=None, device="cpu", **options):
    """Open any model as something to sample from; see `sampling.load.load`."""
    from .sampling.load import load  # torch takes seconds to import: only when it is needed

    return load(path, weights, device, **options)
