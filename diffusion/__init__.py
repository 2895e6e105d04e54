"""Image diffusion in plain PyTorch: train, sample, look, measure.

pipeline = diffusion.load("results/model.pt")
images = pipeline.sample(range(16), steps=50)          # (16, 3, H, W) in [-1, 1]
"""

__version__ = "0.1.0"


class UserError(ValueError):
    """Report a mistake of the user's in one line: what was got, what was expected, what to do.

    The scripts print it without a traceback; in a notebook it is an ordinary ValueError.
    """


def load(path, weights=None, device="cpu", **options):
    """Open any model as something to sample from; see `sampling.load.load`."""
    from .sampling.load import load  # torch takes seconds to import: only when it is needed

    return load(path, weights, device, **options)
