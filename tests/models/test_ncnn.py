"""Reading ncnn models: what the format's parts mean, and files that are something else."""

import numpy as np
import pytest

from pydenoise.models import WeightsError
from pydenoise.models.ncnn import MAGIC, read_ncnn

HALF = (0x01306B47).to_bytes(4, "little")
FULL = bytes(4)
CONV = "Convolution conv 1 1 in out 0=1 1=3 5=1 6=9 9=2 -23310=1,0.1"
DENSE = "InnerProduct dense 1 1 out end 0=3 1=1 2=3"


def write(tmp_path, lines, data: bytes):
    param, weights = tmp_path / "m.param", tmp_path / "m.bin"
    param.write_text("\n".join([MAGIC, f"{len(lines)} 3", *lines]) + "\n")
    weights.write_bytes(data)
    return param, weights


def halves(count: int) -> bytes:
    return HALF + np.arange(count, dtype="<f2").tobytes() + b"\0\0" * (count % 2)


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def test_layers_options_and_both_types_of_weights(tmp_path):
    """Nine half-precision weights end off the grid of four bytes; biases are float32 without a tag."""
    data = halves(9) + floats(0.5) + FULL + floats(1, 2, 3) + floats(4, 5, 6)
    conv, dense = read_ncnn(*write(tmp_path, [CONV, DENSE], data))
    assert (conv.kind, conv.name, conv.inputs, conv.outputs) == ("Convolution", "conv", ["in"], ["out"])
    assert conv.options == {0: 1, 1: 3, 5: 1, 6: 9, 9: 2, 10: [0.1]}
    assert conv.weight.dtype == np.float32
    assert conv.weight.tolist() == list(range(9))
    assert conv.bias.tolist() == [0.5]
    assert (dense.weight.tolist(), dense.bias.tolist()) == ([1, 2, 3], [4, 5, 6])


def test_layers_without_weights_and_without_bias(tmp_path):
    lines = [
        "Input in 0 1 in 0=4",
        "Split s 1 2 in a b",
        "Convolution c 1 1 a c 0=1 1=1 6=1",
        "Scale x 2 1 c b y 0=-233",
    ]
    layers = read_ncnn(*write(tmp_path, lines, FULL + floats(7)))
    assert [layer.weight is None for layer in layers] == [True, True, False, True]
    assert layers[2].bias is None
    assert layers[3].inputs == ["c", "b"]


@pytest.mark.parametrize(
    ("lines", "data", "message"),
    [
        ([CONV], halves(9), "m.bin: ends within the weights of conv"),
        ([CONV], halves(9)[:10], "m.bin: ends within the weights of conv"),
        ([CONV], halves(9) + floats(0, 0), "m.bin: 4 bytes are left after the last layer"),
        ([CONV], b"\x38\x4b\x0d\x00" + bytes(16), "conv are neither float32 nor float16"),
        (["LSTM l 1 1 a b 0=3"], b"", "m.param: line 3 is not a layer of a kind read here: kind LSTM"),
        (["Scale s 1 1 a b 0=8"], b"", "Scale with factors of its own"),
        (["Convolution c 1 1 a b 6=9"], FULL, "without a number of outputs"),
        (["Convolution c one 1 a b"], b"", "line 3"),
        (["Convolution c"], b"", "line 3"),
        (["Crop c 1 1 a b 0:4"], b"", "line 3"),
    ],
)
def test_damaged_or_foreign_models(tmp_path, lines, data, message):
    with pytest.raises(WeightsError, match=message):
        read_ncnn(*write(tmp_path, lines, data))


@pytest.mark.parametrize("content", [b"", b"7767518\n1 1\n", b"\xff\xfe\0\1", b"PK\x03\x04"])
def test_files_that_are_no_graph(tmp_path, content):
    param, weights = write(tmp_path, [], b"")
    param.write_bytes(content)
    with pytest.raises(WeightsError, match="m.param: not an ncnn graph"):
        read_ncnn(param, weights)


def test_a_graph_that_was_cut_off(tmp_path):
    param, weights = write(tmp_path, [CONV, DENSE], b"")
    param.write_text(param.read_text().rsplit("InnerProduct", 1)[0])
    with pytest.raises(WeightsError, match="has 1 layers, not as many as its second line says"):
        read_ncnn(param, weights)


def test_missing_files(tmp_path):
    param, weights = write(tmp_path, [CONV], b"")
    with pytest.raises(WeightsError, match="none.param: cannot be read: No such file"):
        read_ncnn(tmp_path / "none.param", weights)
    with pytest.raises(WeightsError, match="none.bin: cannot be read: No such file"):
        read_ncnn(param, tmp_path / "none.bin")
