"""PyTorch's files: what comes back is what was saved, and nothing that stands in a file is executed."""

import os
import pickle

import numpy as np
import pytest
import torch_files_writer as writer

from wam_jax import torch_files

WRITERS = (writer.write_zip, writer.write_stream)


def arrays():
    rng = np.random.default_rng(0)
    return {
        "weight": rng.normal(size=(3, 2, 5)).astype(np.float32),
        "transposed": np.asfortranarray(rng.normal(size=(4, 3))),
        "half": np.arange(4, dtype=np.float16),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }


@pytest.mark.parametrize("write", WRITERS)
def test_what_was_saved_comes_back(tmp_path, write):
    found = torch_files.read(writer.save(tmp_path / "weights.pt", arrays(), write))
    assert list(found) == list(arrays())
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("write", WRITERS)
def test_two_tensors_may_share_a_storage(tmp_path, write):
    array = np.arange(12, dtype=np.float32)
    views = {
        "all": writer.tensor("0", array),
        "row": writer.tensor("0", array, offset=4, shape=(4,), strides=(1,)),
        "column": writer.tensor("0", array, offset=1, shape=(3,), strides=(4,)),
    }
    found = torch_files.read(write(tmp_path / "views.pt", writer.state_dict(views), {"0": array}))
    np.testing.assert_array_equal(found["row"], [4, 5, 6, 7])
    np.testing.assert_array_equal(found["column"], [1, 5, 9])


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", WRITERS)
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, write):
    harm = tmp_path / "harm"
    path = write(tmp_path / "evil.pt", pickle.dumps({"weight": Payload(harm)}, 2), {})
    with pytest.raises(ValueError, match=r"evil.pt is not read: it asks for posix.mkdir, .* is refused"):
        torch_files.read(path)
    assert not harm.exists()


@pytest.mark.parametrize(
    "function", ["builtins eval", "__builtin__ eval", "numpy load", "torch.load", "torch._utils _import_dotted_name"]
)
def test_only_tensors_can_be_named(tmp_path, function):
    module, _, name = function.rpartition(" ")
    opcodes = b"\x80\x02" + writer.call(module or "torch", name, writer.constant("1 + 1")) + b"."
    with pytest.raises(ValueError, match="is refused"):
        torch_files.read(writer.write_zip(tmp_path / "evil.pt", opcodes, {}))


def test_a_pickle_cannot_change_what_it_calls(tmp_path):
    target = b"ctorch._utils\n_rebuild_tensor_v2\n"
    for state in ({"__defaults__": (1,)}, (None, {"__call__": 1})):
        opcodes = b"\x80\x02" + target + writer.constant(state) + b"b."
        with pytest.raises(ValueError, match="is not read"):
            torch_files.read(writer.write_zip(tmp_path / "evil.pt", opcodes, {}))


@pytest.mark.parametrize(
    "changes", [dict(offset=1), dict(shape=(9,), strides=(1,)), dict(shape=(2, 9), strides=(0, 0)), dict(offset=-1),
                dict(shape=(2, 2), strides=(1,)), dict(length=9), dict(shape=(10**9,), strides=(0,))]
)  # fmt: skip
@pytest.mark.parametrize("write", WRITERS)
def test_a_tensor_never_reaches_beyond_its_storage(tmp_path, write, changes):
    array = np.arange(8, dtype=np.float32)
    opcodes = writer.state_dict({"weight": writer.tensor("0", array, **changes)})
    with pytest.raises(ValueError, match=r"weights.pt is not read: .*(reaches beyond|a tensor of shape|storage 0 has)"):
        torch_files.read(write(tmp_path / "weights.pt", opcodes, {"0": array}))


@pytest.mark.parametrize("write", WRITERS)
def test_a_damaged_file_is_named(tmp_path, write):
    path = tmp_path / "weights.pt"
    writer.save(path, arrays(), write)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="weights.pt is not read: .*expected a state dict"):
            torch_files.read(str(path))


def test_another_pickle_is_named(tmp_path):
    with pytest.raises(ValueError, match="it holds a list, not a state dict"):
        torch_files.read(writer.write_zip(tmp_path / "list.pt", pickle.dumps([1], 2), {}))
