"""Hostile ONNX files, byte by byte: the library would not write most of them."""

from __future__ import annotations

import os
from pathlib import Path

from hostile import Cases, Make


def varint(n: int) -> bytes:
    n &= (1 << 64) - 1
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes(out) + bytes([n])


def part(number: int, payload: bytes | str) -> bytes:
    """A field with a length."""
    raw = payload.encode() if isinstance(payload, str) else payload
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def number(of: int, value: int) -> bytes:
    return varint(of << 3) + varint(value)


def tensor(
    name: str = "w", dims: tuple[int, ...] = (2,), dtype: int = 1, data: bytes | None = bytes(8)
) -> bytes:
    made = b"".join(number(1, n) for n in dims) + number(2, dtype) + part(8, name)
    return made + (b"" if data is None else part(9, data))


def apart(location: str, offset: str = "0", length: str | None = "8") -> bytes:
    """A tensor whose bytes lie in another file."""
    told = {"location": location, "offset": offset} | ({} if length is None else {"length": length})
    pairs = (part(13, part(1, k) + part(2, v)) for k, v in told.items())
    return tensor(data=None) + b"".join(pairs) + number(14, 1)


def node(inputs: str, outputs: str, op: str = "Relu", more: bytes = b"") -> bytes:
    takes = (part(1, n) for n in inputs.split())
    return b"".join(takes) + b"".join(part(2, n) for n in outputs.split()) + part(4, op) + more


def graph(*tensors: bytes, nodes: tuple[bytes, ...] = (), more: bytes = b"") -> bytes:
    made = b"".join(part(1, n) for n in nodes) + part(2, "g")
    return made + b"".join(part(5, t) for t in tensors) + part(11, part(1, "x")) + more


def model(inner: bytes, more: bytes = b"") -> bytes:
    return number(1, 9) + part(2, "test") + part(7, inner) + more


def branch(inner: bytes) -> bytes:
    return node("x", "y", "If", part(5, part(1, "then_branch") + part(6, inner)))


def nested(depth: int) -> bytes:
    inner = graph(tensor())
    for i in range(depth):
        attribute = part(1, "body") + part(6, inner)
        inner = graph(nodes=(node("x", f"y{i}", "Loop", part(5, attribute)),))
    return model(inner)


def wide(fields: int) -> bytes:
    return model(part(2, "g") + number(3, 1) * fields)


GOOD = model(graph(tensor()))

# class -> name -> (bytes, a part of what is said)
FILES: dict[str, tuple[bytes, str]] = {
    "cycle: a node takes what it makes": (model(graph(nodes=(node("y", "y"),))), "before it"),
    "cycle: two nodes take each other's": (
        model(graph(nodes=(node("b", "a"), node("a", "b")))),
        "nothing before it makes",
    ),
    "cycle: through a subgraph": (
        model(graph(nodes=(branch(graph(nodes=(node("z", "q"),))), node("y", "z")))),
        "nothing before it makes",
    ),
    "cycle: a result made twice": (
        model(graph(nodes=(node("x", "y"), node("x", "y")))),
        "a second time",
    ),
    "cycle: a node makes a weight": (
        model(graph(tensor(), nodes=(node("x", "w"),))),
        "a second time",
    ),
    "cycle: an output that nothing makes": (
        model(graph(tensor(), more=part(12, part(1, "nowhere")))),
        "nothing makes its output",
    ),
    "dims: 2^62 by 2^62": (model(graph(tensor(dims=(1 << 62, 1 << 62)))), "has the shape"),
    "dims: negative": (model(graph(tensor(dims=(-1, 2)))), "has the shape"),
    "dims: many": (model(graph(tensor(dims=(1,) * 100))), "axes"),
    "dims: an empty one beside 2^61": (
        model(graph(tensor(dims=(0, 1 << 61, 1 << 61), data=b""))),
        "has the shape",
    ),
    "dims: a terabyte without data": (model(graph(tensor(dims=(1 << 38,)))), "needs 1099511627776"),
    "dims: packed without end": (
        model(graph(part(1, b"\x01" * 5000) + tensor())),
        "numbers",
    ),
    "raw_data: too short": (model(graph(tensor(data=bytes(7)))), "needs 8 bytes, and 7 are"),
    "raw_data: too long": (model(graph(tensor(data=bytes(9)))), "needs 8 bytes, and 9 are"),
    "raw_data: missing": (model(graph(tensor(data=None))), "needs 8 bytes, and 0 are"),
    "raw_data: twice": (model(graph(tensor() + part(9, bytes(8)))), "needs 8 bytes"),
    "raw_data: beside float_data": (model(graph(tensor() + part(4, bytes(8)))), "values twice"),
    "typed: float_data too short": (model(graph(tensor(data=None) + part(4, bytes(4)))), "needs 8"),
    "typed: int64 of a float": (model(graph(tensor(data=None) + part(7, b"\1\2"))), "not kept as"),
    "typed: varints too few": (
        model(graph(tensor(dtype=7, data=None) + part(7, b"\x01"))),
        "needs 16 bytes",
    ),
    "claims: a graph of 2 GB": (
        number(1, 9) + varint(7 << 3 | 2) + varint(2 << 30) + bytes(8),
        "bytes are due",
    ),
    "claims: raw_data of 2 GB": (
        model(graph(tensor(data=None) + varint(9 << 3 | 2) + varint(2 << 30))),
        "bytes are due",
    ),
    "claims: 2^63 bytes": (
        number(1, 9) + varint(7 << 3 | 2) + varint(1 << 63) + bytes(8),
        "a length at byte",
    ),
    "claims: a name of 2 MB": (model(graph(tensor("n" * (2 << 20)))), "a name has"),
    "types: of no number": (model(graph(tensor(dtype=99))), "dtype 99"),
    "types: undefined": (model(graph(tensor(dtype=0))), "dtype 0"),
    "types: a group": (number(1, 9) + part(2, "t") + varint(7 << 3 | 3), "wire type 3"),
    "types: field 0": (model(graph(tensor()), more=b"\x00\x00"), "the number 0"),
    "types: a number without end": (number(1, 9) + part(2, "x") + b"\xff" * 30, "does not end"),
    "types: a name that is not UTF-8": (model(graph(tensor() + part(8, b"\xff\xfe"))), "UTF-8"),
    "nested: 100 deep": (nested(100), "nested more than"),
    "nested: one name twice": (
        model(graph(tensor(), nodes=(branch(graph(tensor())),))),
        "two tensors are named",
    ),
    "nested: two graphs": (model(graph(tensor()), more=part(7, graph())), "two graphs"),
    "nested: no graph": (number(1, 9) + part(2, "test"), "no graph"),
    "nested: two million fields": (wide(2_000_000), "fields"),
    "external: up": (model(graph(apart("../secret"))), "outside its folder"),
    "external: up and back": (model(graph(apart("a/../../secret"))), "outside its folder"),
    "external: from the root": (model(graph(apart("/etc/passwd"))), "outside its folder"),
    "external: a link": (model(graph(apart("link"))), "is a link"),
    "external: a linked folder": (model(graph(apart("folder/secret"))), "is a link"),
    "external: a hard link": (model(graph(apart("hard"))), "hard link"),
    "external: a pipe": (model(graph(apart("pipe"))), "is no file"),
    "external: a folder": (model(graph(apart("."))), "outside its folder"),
    "external: not there": (model(graph(apart("nowhere"))), "cannot be read"),
    "external: too short": (model(graph(apart("data", "4"))), "are needed"),
    "external: another length": (model(graph(apart("data", length="9"))), "needs 8 bytes"),
    "external: negative": (model(graph(apart("data", "-4"))), "at byte -4"),
    "external: not a number": (model(graph(apart("data", "x"))), "not a number"),
    "external: NUL": (model(graph(apart("da\0ta"))), "outside its folder"),
    "external: and here too": (model(graph(apart("data") + part(9, bytes(8)))), "both here"),
}


def surrounded(folder: Path) -> Path:
    """A folder in this one, with a secret beside it, and links to that within."""
    inner = folder / "inner"
    inner.mkdir()
    (folder / "secret").write_bytes(b"SECRET!!")
    (inner / "data").write_bytes(bytes(8))
    (inner / "link").symlink_to(folder / "secret")
    (inner / "folder").symlink_to(folder)
    os.link(folder / "secret", inner / "hard")
    os.mkfifo(inner / "pipe")
    return inner


def cases() -> Cases:
    """The class."""

    def made(raw: bytes) -> Make:
        def make(folder: Path) -> Path:
            path = surrounded(folder) / "a.onnx"
            path.write_bytes(raw)
            return path

        return make

    return {name: made(raw) for name, (raw, _) in FILES.items()}
