"""PyTorch's weights files read without PyTorch, and without executing anything that stands in them.

Both layouts of `torch.save`: the zip of PyTorch 1.6 and later, and the stream of pickles before it, which the older
published weights still have. A pickle may name any function of Python to be called; here only those that rebuild a
tensor can be named, and these are this file's own.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_STREAM_MAGIC, _STREAM_VERSION = 0x1950A86A20F9469CFC6C, 1001
_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


class _Storage(NamedTuple):
    """A flat array of the file; of a stream it is filled after the tensors that look at it were described."""

    key: str
    dtype: np.dtype
    length: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: str) -> dict[str, np.ndarray]:
    """Reads a state dict, the names and tensors that `torch.save(module.state_dict(), path)` wrote.

    Args:
      path: of a .pt or .pth file.

    Returns:
      the arrays by name; entries that are no tensors are left out.

    Raises:
      ValueError: it is no such file, it is damaged, or it asks for more than tensors.
      OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        tensors, load = (_read_zip if zipfile.is_zipfile(io.BytesIO(content)) else _read_stream)(content)
        if not isinstance(tensors, dict):
            raise ValueError(f"it holds a {type(tensors).__name__}, not a state dict")
        return {str(name): _array(tensor, load) for name, tensor in tensors.items() if isinstance(tensor, _Tensor)}
    except Exception as error:  # whatever a pickle's opcodes, a zip or a wrong shape can raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} is not read: {reason}; expected a state dict as torch.save writes it") from error


def _read_zip(content: bytes) -> tuple[Any, Callable[[_Storage], np.ndarray]]:
    archive = zipfile.ZipFile(io.BytesIO(content))
    roots = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("the zip holds no data.pkl (TorchScript and other archives are not state dicts)")
    folder = roots[0].removesuffix("data.pkl")
    orders = [archive.read(name) for name in (f"{folder}byteorder",) if name in archive.namelist()]
    if orders and orders[0] != b"little":
        raise ValueError(f"its byte order is {orders[0][:20]!r}, not little")

    def load(storage: _Storage) -> np.ndarray:
        info = archive.getinfo(f"{folder}data/{storage.key}")
        if info.file_size != storage.length * storage.dtype.itemsize:  # looked at before anything is unpacked
            raise ValueError(f"storage {storage.key} has {info.file_size} bytes, not {storage.length} {storage.dtype}")
        return np.frombuffer(archive.read(info), storage.dtype)

    return _Unpickler(io.BytesIO(archive.read(roots[0]))).load(), load


def _read_stream(content: bytes) -> tuple[Any, Callable[[_Storage], np.ndarray]]:
    file = io.BytesIO(content)
    if not content.startswith(b"\x80") or _Unpickler(file).load() != _STREAM_MAGIC:
        raise ValueError("it is neither a zip nor a stream of PyTorch's")
    if (version := _Unpickler(file).load()) != _STREAM_VERSION:
        raise ValueError(f"its version is {version}, not {_STREAM_VERSION}")
    if not _Unpickler(file).load().get("little_endian"):
        raise ValueError("its byte order is not little")
    unpickler = _Unpickler(file)
    tensors, storages = unpickler.load(), unpickler.storages
    arrays = {}
    for key in _Unpickler(file).load():
        storage = storages[str(key)]
        count = np.frombuffer(file.read(8), "<i8", 1)[0]
        if count != storage.length:
            raise ValueError(f"storage {key} has {count} numbers, not {storage.length}")
        arrays[storage.key] = np.frombuffer(file.read(count * storage.dtype.itemsize), storage.dtype, storage.length)
    return tensors, lambda storage: arrays[storage.key]


class _Unpickler(pickle.Unpickler):
    """Resolves a handful of names, all to this file's own functions and to OrderedDict; refuses every other."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _RebuildTensor()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _RebuildParameter()
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a state dict and is refused")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or dtype not in _DTYPES or any(view):
            raise pickle.UnpicklingError(f"it refers to a {kind!r} that is no whole storage of numbers")
        storage = _Storage(str(key), np.dtype(_DTYPES[dtype]), int(count))
        if self.storages.setdefault(storage.key, storage) != storage:
            raise pickle.UnpicklingError(f"storage {key} is described twice")
        return storage


class _RebuildTensor:
    """What a pickle calls to make a tensor; without attributes, since a pickle may also try to set some."""

    __slots__ = ()

    def __call__(self, storage: _Storage, offset: int, shape: tuple, strides: tuple, *unused: Any) -> _Tensor:
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter:
    """Likewise to make a parameter of a tensor."""

    __slots__ = ()

    def __call__(self, tensor: _Tensor, *unused: Any) -> _Tensor:
        return tensor


def _array(tensor: _Tensor, load: Callable[[_Storage], np.ndarray]) -> np.ndarray:
    """Copies a tensor out of its storage, after checking that it lies within it."""
    storage, offset, shape, strides = tensor
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(not isinstance(x, int) or x < 0 for x in numbers):
        raise ValueError(f"a tensor of shape {shape} and strides {strides} at {offset}")
    size = int(np.prod(shape, dtype=object))
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if size > storage.length or (size and last >= storage.length):
        raise ValueError(f"a tensor of shape {shape} reaches beyond the {storage.length} numbers of its storage")
    if not size:
        return np.zeros(shape, storage.dtype)
    steps = [stride * storage.dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(load(storage)[offset:], shape, steps).copy()
