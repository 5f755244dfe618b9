"""Hostile Flax msgpack files: lengths that lie, trees without end, extensions that are none."""

from __future__ import annotations

import struct

import msgpack

from hostile import Cases, file


def ext(code: int, payload: bytes) -> bytes:
    """An extension."""
    return b"\xc9" + struct.pack(">Ib", len(payload), code) + payload


def array(shape: object = (1,), dtype: object = "float32", data: object = bytes(4)) -> bytes:
    """A tensor as flax has it, with whatever it says of itself."""
    return ext(1, msgpack.packb([shape, dtype, data]))


def tree(value: bytes, key: bytes = b"\xa1a") -> bytes:
    """A map of one name."""
    return b"\x81" + key + value


def cases() -> Cases:
    """The class."""
    chunk = array()
    told = {
        "lengths: a map of 2^32": b"\xdf\xff\xff\xff\xff\xa1a",
        "lengths: an array of 2^32": tree(b"\xdd\xff\xff\xff\xff"),
        "lengths: text of 4 GB": tree(b"\xdb\xff\xff\xff\xff"),
        "lengths: bytes of 4 GB": tree(b"\xc6\xff\xff\xff\xff"),
        "lengths: an extension of 4 GB": tree(b"\xc9\xff\xff\xff\xff\x01"),
        "lengths: cut": tree(array())[:-1],
        "lengths: one too many": tree(array()) + b"\0",
        "lengths: a key of 4 GB": b"\x81\xdb\xff\xff\xff\xff",
        "lengths: nothing after the map": b"\x81",
        "deep: 10,000 maps": tree(b"\x81\xa1a" * 10_000 + b"\xc0"),
        "deep: 10,000 lists": tree(b"\x91" * 10_000 + b"\xc0"),
        "deep: a million lists": tree(b"\x91" * 1_000_000 + b"\xc0"),
        "types: 0xc1": tree(b"\xc1"),
        "types: an unknown extension": tree(ext(77, b"abcd")),
        "types: a timestamp": tree(ext(-1, bytes(4))),
        "types: a root that is a list": b"\x91\xc0" + bytes(0),
        "types: a key that is a list": b"\x81\x90\xc0",
        "types: a key that is null": b"\x81\xc0\xc0",
        "types: a key that is not UTF-8": b"\x81\xa1\xff\xc0",
        "types: one key twice": b"\x82\xa1a\xc0\xa1a\xc0",
        "array: a shape of text": tree(array("x")),
        "array: a shape of fractions": tree(array([1.0])),
        "array: a negative size": tree(array([-1])),
        "array: 2^62 by 2^62": tree(array([1 << 62, 1 << 62])),
        "array: 0 by 2^63": tree(array([0, (1 << 63) - 1, 1 << 62], data=b"")),
        "array: 1,000 axes": tree(array([1] * 1000)),
        "array: an unknown dtype": tree(array(dtype="float31")),
        "array: objects": tree(array(dtype="object")),
        "array: a structured dtype": tree(array(dtype="f4,f4")),
        "array: a dtype of numbers": tree(array(dtype=7)),
        "array: bytes too few": tree(array(data=bytes(3))),
        "array: bytes too many": tree(array(data=bytes(5))),
        "array: bytes that are a list": tree(array(data=[0, 0])),
        "array: two of three": tree(ext(1, msgpack.packb([[1], "float32"]))),
        "array: something behind it": tree(
            ext(1, msgpack.packb([[1], "float32", bytes(4)]) + b"x")
        ),
        "complex: of texts": tree(ext(2, msgpack.packb(["a", "b"]))),
        "chunks: none": tree(
            b"\x83" + msgpack.packb("__msgpack_chunked_array__") + b"\xc3"
            + msgpack.packb("shape") + b"\x81\xa10\x01" + msgpack.packb("chunks") + b"\x80"
        ),
        "chunks: a terabyte": tree(
            b"\x83" + msgpack.packb("__msgpack_chunked_array__") + b"\xc3"
            + msgpack.packb("shape") + b"\x81\xa10" + msgpack.packb(1 << 38)
            + msgpack.packb("chunks") + b"\x81\xa10" + chunk
        ),
        "chunks: of other keys": tree(
            b"\x82" + msgpack.packb("__msgpack_chunked_array__") + b"\xc3\xa1x\xc0"
        ),
        "names: a tree and a tensor of one name": b"\x82\xa3a.b" + chunk
        + b"\xa1a" + tree(chunk, b"\xa1b"),
        "names: a million empty": b"\xdf\x00\x0f\x42\x40" + b"".join(
            msgpack.packb(f"k{i}") + b"\xc1" for i in range(1000)
        ),
        "names: ESC, and damaged": tree(b"\xc1", b"\xa4\x1b[2J"),
    }  # fmt: skip
    return {n: file("a.msgpack", x) for n, x in told.items()}
