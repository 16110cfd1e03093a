"""Reading ONNX files: messages written here byte by byte, and by the onnx package where it is installed."""

import struct

import numpy as np
import pytest

from pydenoise.models import WeightsError
from pydenoise.models.onnx_weights import Node, read_onnx


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name: str, dims: tuple[int, ...], kind: int, *data: bytes) -> bytes:
    return b"".join((*(field(1, size) for size in dims), field(2, kind), field(8, name), *data))


def model(*graph: bytes) -> bytes:
    entry = field(1, "author") + field(2, "nobody")
    return field(1, 8) + field(2, "a producer") + field(14, entry) + field(7, b"".join(graph))


def read(tmp_path, content: bytes):
    (tmp_path / "m.onnx").write_bytes(content)
    return read_onnx(tmp_path / "m.onnx")


def test_tensors_nodes_and_metadata(tmp_path):
    values = np.arange(6, dtype="<f4")
    single = varint(4 << 3 | 5) + struct.pack("<f", 2.5)
    node = field(1, "x") + field(1, "w") + field(2, "y") + field(3, "conv") + field(4, "Conv") + field(5, b"attribute")
    found = read(
        tmp_path,
        model(
            field(5, tensor("w", (2, 3), 1, field(9, values.tobytes()))),
            field(5, tensor("packed", (6,), 1, field(4, values.tobytes()))),
            field(5, field(1, varint(2) + varint(1)) + tensor("dims_packed", (), 1, single, single)),
            field(5, tensor("scalar", (), 7, field(9, struct.pack("<q", -3)))),
            field(5, tensor("half", (300,), 10, field(9, bytes(600)))),  # a length of two bytes
            field(1, node),
        ),
    )
    weights = found.initializers
    assert weights["w"].tolist() == values.reshape(2, 3).tolist()
    assert weights["packed"].tolist() == values.tolist()
    assert weights["dims_packed"].tolist() == [[2.5], [2.5]]
    assert (weights["scalar"].shape, int(weights["scalar"]), weights["scalar"].dtype) == ((), -3, np.int64)
    assert (weights["half"].shape, weights["half"].dtype) == ((300,), np.float16)
    assert found.nodes == [Node("Conv", "conv", ("x", "w"), ("y",))]
    assert found.metadata == {"author": "nobody"}


RAW = field(9, bytes(8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has no graph"),
        (b"PK\x03\x04", "a field of wire type"),
        (field(1, 8), "it has no graph"),
        (model(field(5, tensor("w", (3,), 1, RAW))), r"w has 8 bytes, which do not fill the shape \[3\]"),
        (model(field(5, tensor("w", (2**63, 8), 1, RAW))), "which do not fill the shape"),
        (model(field(5, tensor("w", (2,), 8, RAW))), "w has the data type 8"),
        (model(field(5, tensor("w", (2,), 7))), "w has no raw data"),
        (model(field(5, tensor("w", (2,), 1, field(14, 1)))), "w lies in another file"),
        (model(field(5, tensor("w", (2,), 1, RAW)))[:-3], "it ends within a field"),
        (varint(7 << 3 | 2) + b"\x80", "it ends within a number"),
        (b"\xff" * 11, "a number of more than 64 bits"),
        (field(7, 1), "field 7 is a number"),
        (model(field(5, field(8, b"\xff\xfe"))), "a name is no text"),
    ],
)
def test_damaged_or_foreign_files(tmp_path, content, message):
    with pytest.raises(WeightsError, match=f"m.onnx: not an ONNX file, or a damaged one: .*{message}"):
        read(tmp_path, content)


def test_missing_file(tmp_path):
    with pytest.raises(WeightsError, match="none.onnx: cannot be read: No such file"):
        read_onnx(tmp_path / "none.onnx")


def test_what_the_onnx_package_writes(tmp_path):
    onnx = pytest.importorskip("onnx")
    arrays = [np.random.default_rng(0).normal(size=(3, 4)).astype(kind) for kind in ("f4", "f8", "f2")]
    tensors = [onnx.numpy_helper.from_array(array, f"t{index}") for index, array in enumerate(arrays)]
    tensors.append(onnx.helper.make_tensor("listed", onnx.TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0]))
    node = onnx.helper.make_node("Identity", ["t0"], ["y"], name="n")
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 4])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [output], tensors)), tmp_path / "m.onnx")
    found = read_onnx(tmp_path / "m.onnx")
    for index, array in enumerate(arrays):
        assert found.initializers[f"t{index}"].dtype == array.dtype
        assert np.array_equal(found.initializers[f"t{index}"], array)
    assert found.initializers["listed"].tolist() == [[1, 2], [3, 4]]
    assert found.nodes == [Node("Identity", "n", ("t0",), ("y",))]
