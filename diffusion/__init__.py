"""Image diffusion in plain PyTorch: train, sample, look, measure."""

__version__ = "0.1.0"


class UserError(ValueError):
    """A mistake of the user's, told in one line: what was got, what was expected, what to do.

    The scripts print it without a traceback; in a notebook it is an ordinary ValueError.
    """
