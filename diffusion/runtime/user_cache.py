"""The user's own cache folder: networks, what torch has compiled."""

import errno
import os
from pathlib import Path

from .. import UserError


def cache_folder() -> Path:
    """Return this user's own cache folder, where nobody else can lay anything."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise UserError("there is no home folder: name one for caches in XDG_CACHE_HOME") from None
    return Path(root) / "diffusion"


def private_folder(name: str) -> Path:
    """Create a folder in the user's cache that nobody else can read or write.

    Raises UserError if it, or the cache, is or leads by a link to what belongs to somebody else.
    """
    cache = cache_folder()
    for folder, closed in ((cache, 0o022), (cache / name, 0o077)):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.stat()
            if hasattr(os, "getuid"):  # Windows has access lists instead
                if {about.st_uid, folder.lstat().st_uid} != {os.getuid()}:
                    raise PermissionError(errno.EPERM, "it belongs to another user")
                if about.st_mode & closed:
                    folder.chmod(about.st_mode & 0o777 & ~closed)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be used ({error.strerror}): name another folder for caches in "
                "XDG_CACHE_HOME"
            ) from None
    return cache / name
