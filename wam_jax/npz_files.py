"""Npz files, a user's or of a run that was cut off: read without executing anything, and refused in one voice."""

import zipfile
import zlib
from collections.abc import Sequence

import numpy as np


def read(path: str, what: str, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Reads the arrays of an npz file.

    Args:
      path: of the file.
      what: it should be, for the error: "the recording".
      names: arrays that are needed; the others are left unread. Empty: all are read.

    Raises:
      ValueError: the file cannot be read, or lacks an array.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is a single array; expected an npz of several")
        with file:
            missing = [name for name in names if name not in file]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}")
            return {name: file[name] for name in names or file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = "it is no npz file, or a pickled one, which is never loaded" if "pickle" in str(error) else error
        raise ValueError(f"cannot read {what} {path}: {reason}; get or write the file again") from error
