"""Reads the pickled .npy files of CALVIN without executing anything in them.

`np.load(..., allow_pickle=True)` runs whatever code a file names. Here only numpy arrays, numpy scalars and Python's
own containers and numbers can come out; a file that names anything else is refused before it is called.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

# Everything that a pickle of arrays, strings, numbers, lists, tuples and dicts refers to by name. numpy.core is what
# numpy 1 calls numpy._core.
_ALLOWED = {
    (module, name)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    for name in ("_reconstruct", "scalar")
} | {("numpy", "ndarray"), ("numpy", "dtype")}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which an array file has no use for")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load(path: Path) -> np.ndarray:
    """Reads an .npy file, with Python objects in it or not.

    Args:
      path: of the file.

    Returns:
      the array; a pickled dict is its single entry, `load(path).item()`.

    Raises:
      ValueError: the file is no .npy file, is damaged, or refers to anything but arrays and plain containers.
    """
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            has_objects = read_header(file)[2].hasobject
            if has_objects:
                return _checked(_ArrayUnpickler(file).load())
        return np.load(path, allow_pickle=False)
    except OSError:
        raise  # names the file and what is wrong with it already
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{path}: not read ({_one_line(error)}); expected an .npy file; download it again") from error


def _checked(value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__} instead of an array")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
