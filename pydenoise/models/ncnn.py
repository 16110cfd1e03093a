"""Reading ncnn models: a text file (``.param``) with the graph, and a raw one (``.bin``) with the weights.

The text is a magic number, the counts of layers and blobs, and a layer a line: kind, name, numbers of inputs and
outputs, their names, then ``key=value`` with small integer keys whose meaning depends on the kind (an array under key k
is written as ``-(23300 + k)=count,value,...``). The weights follow each other in the order of the layers; weight arrays
begin with a tag of four bytes that gives their type, bias arrays have none.

Source: ncnn's documentation of its file formats (docs/developer-guide: param-and-model-file-structure,
operation-param-weight-table).
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pydenoise.models.weights import WeightsError

MAGIC = "7767517"
ARRAY_KEY = -23300
TYPES = {0: np.dtype("<f4"), 0x01306B47: np.dtype("<f2")}  # tag: how the weights are stored
# Kinds whose weights are read: the keys under which they give the number of weights, and whether there is a bias.
WEIGHT_KEYS = {"Convolution": (6, 5), "Deconvolution": (6, 5), "InnerProduct": (2, 1)}
OUTPUTS_KEY = 0  # the number of biases
WITHOUT_WEIGHTS = ("Input", "Split", "Pooling", "Crop", "Eltwise", "Scale", "ReLU", "Sigmoid", "Concat")
SCALE_BY_INPUT = -233  # Scale, key 0: the factors are its second input; otherwise they are weights


@dataclass
class Layer:
    """A layer: options as numbers or lists of numbers; ``weight`` and ``bias`` are flat float32 arrays or ``None``."""

    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    options: dict[int, float | list[float]] = field(default_factory=dict)
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None


def read_ncnn(param: str | Path, weights: str | Path) -> list[Layer]:
    """The layers of a model in the order of the file.

    Raises :class:`WeightsError` if a file is missing, is not of this format or is damaged, or holds a kind of layer or
    of number that is not read here.
    """
    layers = read_param(param)
    try:
        data = Path(weights).read_bytes()
    except OSError as error:
        raise WeightsError(f"{weights}: cannot be read: {error.strerror}") from error
    reader = _Reader(data, str(weights))
    for layer in layers:
        if layer.kind in WEIGHT_KEYS:
            count, has_bias = (layer.options.get(key, 0) for key in WEIGHT_KEYS[layer.kind])
            layer.weight = reader.tagged(count, layer.name)
            layer.bias = reader.floats(layer.options[OUTPUTS_KEY], layer.name) if has_bias else None
    if reader.position != len(data):
        raise WeightsError(f"{weights}: {len(data) - reader.position} bytes are left after the last layer of {param}")
    return layers


def read_param(path: str | Path) -> list[Layer]:
    """The graph alone: layers without weights."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        lines = []
    if not lines or lines[0].strip() != MAGIC:
        raise WeightsError(f"{path}: not an ncnn graph: the first line is not {MAGIC}")
    layers = []
    for number, line in enumerate(lines[2:], start=3):
        if line.strip():
            try:
                layers.append(_parse(line.split()))
            except (ValueError, IndexError) as error:
                raise WeightsError(f"{path}: line {number} is not a layer of a kind read here: {error}") from error
    if len(lines) < 2 or lines[1].split()[:1] != [str(len(layers))]:
        raise WeightsError(f"{path}: has {len(layers)} layers, not as many as its second line says")
    return layers


def _parse(words: list[str]) -> Layer:
    kind, name, inputs, outputs = words[0], words[1], int(words[2]), int(words[3])
    blobs, options = words[4 : 4 + inputs + outputs], words[4 + inputs + outputs :]
    layer = Layer(kind, name, blobs[:inputs], blobs[inputs:])
    for option in options:
        text, value = option.split("=")
        if int(text) <= ARRAY_KEY:
            layer.options[ARRAY_KEY - int(text)] = [_number(item) for item in value.split(",")[1:]]
        else:
            layer.options[int(text)] = _number(value)
    if kind not in WEIGHT_KEYS and kind not in WITHOUT_WEIGHTS:
        raise ValueError(f"kind {kind}")
    if kind == "Scale" and layer.options.get(0) != SCALE_BY_INPUT:
        raise ValueError("Scale with factors of its own")
    if kind in WEIGHT_KEYS and not isinstance(layer.options.get(OUTPUTS_KEY), int):
        raise ValueError(f"{kind} without a number of outputs")
    return layer


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)


class _Reader:
    """Takes arrays off the front of ``data``."""

    def __init__(self, data: bytes, name: str):
        self.data, self.name, self.position = data, name, 0

    def tagged(self, count: int, layer: str) -> np.ndarray:
        tag = int.from_bytes(self._take(4, layer), "little")
        if tag not in TYPES:
            raise WeightsError(f"{self.name}: the weights of {layer} are neither float32 nor float16 (tag {tag:#x})")
        dtype = TYPES[tag]
        array = np.frombuffer(self._take(count * dtype.itemsize, layer), dtype).astype(np.float32)
        self._take(-self.position % 4, layer)
        return array

    def floats(self, count: int, layer: str) -> np.ndarray:
        return np.frombuffer(self._take(4 * count, layer), "<f4").astype(np.float32)

    def _take(self, size: int, layer: str) -> bytes:
        end = self.position + size
        if size < 0 or end > len(self.data):
            raise WeightsError(f"{self.name}: ends within the weights of {layer}")
        chunk, self.position = self.data[self.position : end], end
        return chunk
