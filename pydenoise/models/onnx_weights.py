"""Reading the weights of an ONNX file: initialisers, names of nodes, metadata. No onnx package, nothing is run.

An ONNX file is one protobuf message. In protobuf a message is a sequence of fields, each a key (field number * 8 + wire
type) and a value: an integer of 7 bits a byte (wire type 0), 8 or 4 raw bytes (1, 5), or a length and that many bytes
(2), which are text, raw data or a message again. Fields that are not needed here are skipped.

Source: onnx.proto3 of the ONNX standard (field numbers), the protobuf encoding's documentation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pydenoise.models.weights import WeightsError

# Field numbers of the messages.
MODEL_GRAPH, MODEL_METADATA = 7, 14
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_KIND = 1, 2, 3, 4
TENSOR_DIMS, TENSOR_TYPE, TENSOR_FLOATS, TENSOR_NAME, TENSOR_RAW, TENSOR_LOCATION = 1, 2, 4, 8, 9, 14
ENTRY_KEY, ENTRY_VALUE = 1, 2
DTYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 10: "<f2", 11: "<f8"}  # TensorProto.DataType

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Node:
    """A node of the graph, without its attributes."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class OnnxWeights:
    """Initialisers by name (read-only arrays), nodes in the order of the file, and the file's metadata."""

    initializers: dict[str, np.ndarray]
    nodes: list[Node]
    metadata: dict[str, str]


def read_onnx(path: str | Path) -> OnnxWeights:
    """Read ``path``.

    Raises :class:`WeightsError` if the file is missing, is no ONNX file or is damaged, or keeps weights in a form that
    is not read here (other files, types other than the common ones).
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return _model(memoryview(data))
    except _Malformed as error:
        raise WeightsError(f"{path}: not an ONNX file, or a damaged one: {error}") from error


class _Malformed(ValueError):
    """What stands in the file is no ONNX model."""


# ---------------------------------------------------------------------------------------------------------- messages


def _model(data: memoryview) -> OnnxWeights:
    model = _fields(data)
    graphs = _messages(model, MODEL_GRAPH)
    if len(graphs) != 1:
        raise _Malformed("it has no graph")
    graph = _fields(graphs[0])
    entries = [_fields(entry) for entry in _messages(model, MODEL_METADATA)]
    return OnnxWeights(
        dict(_tensor(tensor) for tensor in _messages(graph, GRAPH_INITIALIZER)),
        [_node(node) for node in _messages(graph, GRAPH_NODE)],
        {_text(entry, ENTRY_KEY): _text(entry, ENTRY_VALUE) for entry in entries},
    )


def _node(data: memoryview) -> Node:
    fields = _fields(data)
    inputs, outputs = (tuple(_decode(text) for text in _messages(fields, key)) for key in (NODE_INPUT, NODE_OUTPUT))
    return Node(_text(fields, NODE_KIND), _text(fields, NODE_NAME), inputs, outputs)


def _tensor(data: memoryview) -> tuple[str, np.ndarray]:
    fields = _fields(data)
    name = _text(fields, TENSOR_NAME)
    kind = fields.get(TENSOR_TYPE, [0])[-1]
    if fields.get(TENSOR_LOCATION, [0])[-1]:
        raise _Malformed(f"{name} lies in another file")
    if kind not in DTYPES:
        raise _Malformed(f"{name} has the data type {kind}, which is not read here")
    if TENSOR_RAW in fields:
        parts = _messages(fields, TENSOR_RAW)
    elif DTYPES[kind] == "<f4":
        parts = _messages(fields, TENSOR_FLOATS)  # packed, or one value a field: raw bytes either way
    else:
        raise _Malformed(f"{name} has no raw data")
    shape = [size for field in fields.get(TENSOR_DIMS, []) for size in _integers(field)]
    content = b"".join(parts)
    if len(content) != np.dtype(DTYPES[kind]).itemsize * math.prod(shape):
        raise _Malformed(f"{name} has {len(content)} bytes, which do not fill the shape {shape}")
    return name, np.frombuffer(content, DTYPES[kind]).reshape(shape)


# ---------------------------------------------------------------------------------------------------------- protobuf


def _fields(data: memoryview) -> dict[int, list]:
    """The fields of a message: number -> its values in order, integers or raw bytes."""
    fields: dict[int, list] = {}
    for number, value in _walk(data):
        fields.setdefault(number, []).append(value)
    return fields


def _walk(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == BYTES:
            size, position = _varint(data, position)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise _Malformed(f"a field of wire type {wire}")
        if position + size > len(data):
            raise _Malformed("it ends within a field")
        yield number, data[position : position + size]
        position += size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise _Malformed("it ends within a number" if shift <= 63 else "a number of more than 64 bits")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _integers(field: int | memoryview) -> list[int]:
    """A repeated integer's field: one value, or several packed."""
    if isinstance(field, int):
        return [field]
    values, position = [], 0
    while position < len(field):
        value, position = _varint(field, position)
        values.append(value)
    return values


def _messages(fields: dict[int, list], number: int) -> list[memoryview]:
    values = fields.get(number, [])
    if any(isinstance(value, int) for value in values):
        raise _Malformed(f"field {number} is a number")
    return values


def _text(fields: dict[int, list], number: int) -> str:
    return _decode(_messages(fields, number)[-1]) if number in fields else ""


def _decode(data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise _Malformed("a name is no text") from error
