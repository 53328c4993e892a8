"""Our reader of tensor tables against the gguf package's, and damaged files."""

import numpy as np
import pytest

import labkit
from labkit.engines import _gguf_table, llamacpp
from labkit.types import LabkitError, Recipe

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module", params=["f32", "f16", "bf16", "q4_k_m", "tq2_0"])
def file(request):
    return labkit.build(labkit.checkpoint("edgehome"), Recipe("llamacpp", request.param)).path / "model.gguf"


def test_the_table_and_the_bytes_are_the_packages(file):
    theirs, ours = gguf.GGUFReader(file).tensors, _gguf_table.entries(file)
    assert len(theirs) == len(ours) > 50
    for want, one in zip(theirs, ours, strict=True):
        assert (want.name, tuple(int(n) for n in reversed(want.shape)), want.tensor_type) == (one.name, one.shape, one.kind)
        assert (want.n_bytes, want.data_offset) == (one.size, one.first)
        found = _gguf_table.data(file, one)
        assert found.dtype == want.data.dtype and found.shape == want.data.shape and np.array_equal(found, want.data)


def test_a_file_with_every_kind_of_key_is_stepped_over(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "uint64", "int64", "float64"):
        getattr(writer, f"add_{kind}")(f"key.{kind}", 3)
    writer.add_bool("key.bool", True)
    writer.add_string("key.text", "häuschen")
    writer.add_array("key.texts", ["a", "", "ção"])
    writer.add_array("key.numbers", [1.5, 2.5])
    writer.add_array("key.nested", [[1, 2], [3, 4, 5]])
    writer.add_custom_alignment(128)
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    one, two = _gguf_table.entries(tmp_path / "odd.gguf")
    assert one.shape == (2, 3) and one.first % 128 == 0 == two.first % 128
    assert np.array_equal(_gguf_table.data(tmp_path / "odd.gguf", one), [[0, 1, 2], [3, 4, 5]])
    assert np.array_equal(_gguf_table.data(tmp_path / "odd.gguf", two), [0, 1, 2, 3, 4])


def test_damage_is_one_sentence(file, tmp_path):
    whole = file.read_bytes()
    for name, data in {
        "empty": b"", "text": b"hello, world", "half": whole[: len(whole) // 2], "keys": whole[:2000], "short": whole[:-1000],
        "version": whole[:4] + b"\x09\0\0\0" + whole[8:], "long text": whole[:24] + b"\xff" * 8 + whole[32:],
    }.items():  # fmt: skip
        (tmp_path / "bad.gguf").write_bytes(data)
        with pytest.raises(LabkitError, match="not a readable GGUF file") as said:
            llamacpp.tensors(tmp_path / "bad.gguf")
        assert len(str(said.value).splitlines()) == 1, name
    with pytest.raises(LabkitError, match="does not exist"):
        llamacpp.tensors(tmp_path / "none.gguf")
