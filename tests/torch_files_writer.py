"""Writes state dicts as torch.save does, in both of its layouts, without PyTorch."""

import io
import pickle
import zipfile

import numpy as np

TYPES = {"f4": "FloatStorage", "f8": "DoubleStorage", "i8": "LongStorage", "f2": "HalfStorage"}


def constant(value) -> bytes:
    """Opcodes that push a value."""
    return pickle.dumps(value, 2)[2:-1]


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """Opcodes that call a function with what its arguments' opcodes push."""
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def tensor(key: str, array: np.ndarray, *, offset: int = 0, shape=None, strides=None, length=None) -> bytes:
    kind = f"ctorch\n{TYPES[array.dtype.str[1:]]}\n".encode()
    length = array.size if length is None else length
    storage = b"(" + constant("storage") + kind + constant(key) + constant("cpu") + constant(length) + b"tQ"
    strides = tuple(x // array.itemsize for x in array.strides) if strides is None else strides
    layout = [constant(x) for x in (offset, array.shape if shape is None else shape, strides, False)]
    return call("torch._utils", "_rebuild_tensor_v2", storage, *layout, call("collections", "OrderedDict"))


def state_dict(tensors: dict[str, bytes]) -> bytes:
    items = b"".join(constant(name) + opcodes for name, opcodes in tensors.items())
    return b"\x80\x02" + call("collections", "OrderedDict") + b"(" + items + b"u."


def write_zip(path, opcodes: bytes, storages: dict[str, np.ndarray]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", opcodes)
        archive.writestr("archive/byteorder", "little")
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes("A"))
        archive.writestr("archive/version", "3\n")
    return str(path)


def write_stream(path, opcodes: bytes, storages: dict[str, np.ndarray]) -> str:
    file = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001}):
        pickle.dump(value, file, 2)
    file.write(opcodes)
    pickle.dump(list(storages), file, 2)
    for array in storages.values():
        file.write(array.size.to_bytes(8, "little") + array.tobytes("A"))
    path.write_bytes(file.getvalue())
    return str(path)


def save(path, arrays: dict[str, np.ndarray], write=write_zip) -> str:
    """Saves arrays under their names; returns the path."""
    storages = {str(index): array for index, array in enumerate(arrays.values())}
    described = {name: tensor(str(index), array) for index, (name, array) in enumerate(arrays.items())}
    return write(path, state_dict(described), storages)
