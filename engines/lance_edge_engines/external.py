"""Which tensors of a serialised ONNX graph lie in files.

ONNX Runtime opens such files by itself, and before 1.24 also by absolute path. So what a graph names
is found beforehand, by walking its protocol buffers: no parser of them is among the dependencies.
"""

from __future__ import annotations

from collections.abc import Iterator

# Messages that can hold tensors: field number -> what the field holds (onnx.proto, IR version 13).
HOLDS = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}
NAME, EXTERNAL_DATA, DATA_LOCATION = 8, 13, 14  # fields of a tensor

# Protocol buffers' own limits, or below them: what exceeds them is read in more than one way.
LARGEST_TAG, LARGEST_LENGTH = (1 << 32) - 1, (1 << 31) - 1
DEEPEST = 100
MOST_FIELDS = 1_000_000  # the default screener's graph has some ten thousand

VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5  # how a field is written
GRAPH_FIELD, INITIALIZER_FIELD = 7, 5

Message = memoryview


class Malformed(ValueError):
    """Bytes that are no protocol buffer, or none that every parser reads alike."""


def tensors_in_files(graph: bytes) -> tuple[set[str], bool]:
    """Names of the main graph's initializers that lie in files; whether any other tensor does.

    Walks what can hold tensors, so the time follows the number of fields: 6 ms for the default
    screener's graph. Raises Malformed.
    """
    initializers = set()
    others = False
    fields = Fields()
    for path, tensor in _tensors("Model", memoryview(graph), (), fields):
        name, external = _tensor(tensor, fields)
        if external and path == (GRAPH_FIELD, INITIALIZER_FIELD):
            initializers.add(name)
        elif external:
            others = True
    return initializers, others


class Fields:
    """Reads messages' fields, and not without end."""

    def __init__(self) -> None:
        self.left = MOST_FIELDS

    def of(self, message: Message) -> Iterator[tuple[int, int | Message | None]]:
        """Numbers and values of a message's fields; None for numbers of fixed width."""
        at = 0
        while at < len(message):
            self.left -= 1
            if self.left < 0:
                raise Malformed(f"more than {MOST_FIELDS:,} fields")
            tag, at = _varint(message, at)
            if tag > LARGEST_TAG or tag < 8:
                raise Malformed("a field with a number that there is not")
            written = tag & 7
            value: int | Message | None = None
            if written == VARINT:
                value, at = _varint(message, at)
            elif written == BYTES:
                length, at = _varint(message, at)
                if length > LARGEST_LENGTH:
                    raise Malformed("a field that is too long")
                value, at = message[at : at + length], at + length
            elif written in (FIXED_32, FIXED_64):
                at += 4 if written == FIXED_32 else 8
            else:
                raise Malformed(f"a field of wire type {written}")
            if at > len(message):
                raise Malformed("it ends within a field")
            yield tag >> 3, value


def _tensors(
    kind: str, message: Message, path: tuple[int, ...], fields: Fields
) -> Iterator[tuple[tuple[int, ...], Message]]:
    """Every tensor below a message, with the numbers of the fields that lead to it."""
    if len(path) > DEEPEST:
        raise Malformed(f"messages within messages, more than {DEEPEST} deep")
    if kind == "Tensor":
        yield path, message
        return
    for number, value in fields.of(message):
        held = HOLDS[kind].get(number)
        if held and isinstance(value, Message):
            yield from _tensors(held, value, (*path, number), fields)


def _tensor(message: Message, fields: Fields) -> tuple[str, bool]:
    """A tensor's name, and whether anything says that it lies in a file."""
    name, external = "", False
    for number, value in fields.of(message):
        if number == NAME and isinstance(value, Message):
            try:
                name = bytes(value).decode("utf-8")
            except UnicodeDecodeError as error:
                raise Malformed("a name that is no UTF-8") from error
        external |= number == EXTERNAL_DATA or (number == DATA_LOCATION and value != 0)
    return name, external


def _varint(message: Message, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise Malformed("it ends within a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise Malformed("a number of more than ten bytes")
