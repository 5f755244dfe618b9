"""flax's msgpack: our reader and writer against flax itself, the msgpack package and damage."""

from __future__ import annotations

import contextlib
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.serialization
import msgpack
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.containers import dtypes, flax_msgpack
from zoo.containers.base import TensorInfo
from zoo.containers.errors import CorruptInput, UsageError, ZooError
from zoo.containers.flax_msgpack import MsgpackReader, MsgpackWriter, looks_like
from zoo.containers.flax_msgpack import scan as msgpack_scan

CODES = list(dtypes.NUMPY)
FIXTURE = Path(__file__).parent / "data/hf_flax_v4/bert_classifier"
CHUNKED = "__msgpack_chunked_array__"


def noise(code: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bits as dtype `code`: NaN payloads, infinities, subnormals and all."""
    info = TensorInfo(code, shape)
    raw = np.random.default_rng(seed).integers(0, 256, info.nbytes, np.uint8)
    return (raw & 1 if code == "BOOL" else raw).view(dtypes.NUMPY[code]).reshape(shape)


def bits(array: Any) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.tobytes()


def header_of(arrays: dict[str, np.ndarray]) -> dict[str, TensorInfo]:
    return {n: TensorInfo(dtypes.code_of(a.dtype), a.shape) for n, a in arrays.items()}


def write(path: Path, arrays: dict[str, np.ndarray]) -> bytes:
    with MsgpackWriter(path, header_of(arrays), {"format": "pt"}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
        writer.finish()
    return path.read_bytes()


def nested(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = array
    return tree


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {name: tree}
    return {
        n: x for k, v in tree.items() for n, x in flat(v, f"{name}.{k}" if name else str(k)).items()
    }


def read_all(path: Path) -> dict[str, tuple[Any, ...]]:
    with MsgpackReader(path) as reader:
        return {name: bits(reader.read(name)) for name in reader.tensors}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.msgpack"


@pytest.fixture
def everything() -> dict[str, np.ndarray]:
    """Every dtype, with no axis, an empty one, and three."""
    shapes: list[tuple[int, ...]] = [(), (3, 0, 2), (2, 3, 5)]
    return {f"z.{c}.a{len(s)}{0 in s}": noise(c, s) for c in CODES for s in shapes}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flax_msgpack, "MAX_CHUNK_SIZE", 40)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 40)


def test_bytes_spelled_out(path: Path) -> None:
    arrays = {"b.k": np.array([[-0.0]], np.float32), "a": np.array(7, np.uint8)}
    assert write(path, arrays) == (
        b"\x82\xa1a\xc7\x0b\x01\x93\x90\xa5uint8\xc4\x01\x07"
        b"\xa1b\x81\xa1k\xc7\x12\x01\x93\x92\x01\x01\xa7float32\xc4\x04\0\0\0\x80"
    )


def test_writer_equals_flax(path: Path, everything: dict[str, np.ndarray]) -> None:
    arrays = everything | {
        "z.10.kernel": noise("F32", (300, 7)),
        "z.2.kernel": noise("BF16", (70_000,)),
        "ü": noise("I8", (200, 1)),
        "": noise("I8", (1,)),
        "x" * 31: noise("I8", (1,)),
        "x" * 32: noise("I8", (2,)),
        "x" * 256: noise("I8", (3,)),
        "x" * 70_000: noise("I8", (4,)),
        "a..b": noise("I8", (1,) * 20),
    }
    shuffled = dict(random.Random(0).sample(sorted(arrays.items()), len(arrays)))
    assert write(path, shuffled) == flax.serialization.msgpack_serialize(nested(arrays))


@pytest.mark.parametrize("count", [0, 15, 16, 65_536])
def test_maps_of_any_size(path: Path, count: int) -> None:
    one = np.zeros(0, np.int8)
    arrays = {f"p.{i}": one for i in range(count)}
    with MsgpackWriter(path, header_of(arrays), {}) as writer:
        for name in arrays if count < 100 else ():
            writer.write(name, one)  # they have no bytes
    assert path.read_bytes() == flax.serialization.msgpack_serialize(nested(arrays))
    with MsgpackReader(path) as reader:
        assert reader.tensors.keys() == arrays.keys()


@pytest.mark.parametrize("size", range(30))
def test_extensions_of_any_size(path: Path, size: int) -> None:
    arrays = {"a": noise("I8", (size,)), "b": noise("U16", (size,))}
    assert write(path, arrays) == flax.serialization.msgpack_serialize(dict(arrays))
    assert read_all(path) == {n: bits(a) for n, a in arrays.items()}


@pytest.mark.usefixtures("small_chunks")
def test_chunks(path: Path) -> None:
    arrays = {
        f"p.{code}{size}": noise(code, (size, 2))
        for code in ("F32", "U8", "C64", "BF16")
        for size in (2, 3, 5, 7, 10, 11, 20, 21, 100)
    }
    raw = write(path, arrays)
    assert raw == flax.serialization.msgpack_serialize(nested(arrays))
    assert raw.count(CHUNKED.encode()) == 20
    assert read_all(path) == {n: bits(a) for n, a in sorted(arrays.items())}
    with MsgpackReader(path) as reader:
        assert reader.extras == {}


def test_flax_reads_what_we_write(path: Path, everything: dict[str, np.ndarray]) -> None:
    write(path, everything)
    restored = flat(flax.serialization.msgpack_restore(path.read_bytes()))
    assert {n: bits(a) for n, a in restored.items()} == {
        n: bits(a) for n, a in sorted(everything.items())
    }


def test_every_dtype_bit_for_bit(path: Path, everything: dict[str, np.ndarray]) -> None:
    write(path, everything)
    assert read_all(path) == {n: bits(a) for n, a in everything.items()}
    with MsgpackReader(path) as reader:
        assert reader.tensors == header_of(everything)
        assert all(
            (a := reader.read(n)).flags.c_contiguous and a.flags.writeable for n in reader.tensors
        )


def test_any_memory_order(path: Path) -> None:
    base = noise("F32", (6, 4, 2))
    arrays = {
        "fortran": np.asfortranarray(base),
        "transposed": base.T,
        "strided": base[::2, ::-1],
        "broadcast": np.broadcast_to(base[0, 0], (3, 2)),
    }
    assert write(path, arrays) == flax.serialization.msgpack_serialize(dict(arrays))
    assert read_all(path) == {n: bits(np.array(a, order="C")) for n, a in arrays.items()}


def test_what_else_flax_writes(path: Path) -> None:
    tree = {
        "params": {"k": np.ones((2, 3)), "s": np.float32(2.5), "c": np.array(1 + 2j, np.complex64)},
        "step": 70_000,
        "negative": -5,
        "lr": 1e-3,
        "name": "ä" * 40,
        "none": None,
        "flags": {"on": True, "off": False},
        "blob": b"\0\xff" * 200,
        "z": 3 - 4j,
        "empty": {},
        "list": [1, [2.5, "x"], None],
        "branches": [np.zeros(2, np.int8), {"k": np.ones(1, np.int8)}, 7],
    }
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    with MsgpackReader(path) as reader:
        assert reader.container == "msgpack"
        assert reader.tensors == {
            "branches.0": TensorInfo("I8", (2,)),
            "branches.1.k": TensorInfo("I8", (1,)),
            "params.c": TensorInfo("C64", ()),
            "params.k": TensorInfo("F64", (2, 3)),
            "params.s": TensorInfo("F32", ()),
        }
        assert reader.read("params.s") == 2.5
        assert reader.extras == {
            "step": 70_000,
            "negative": -5,
            "lr": 1e-3,
            "name": "ä" * 40,
            "none": None,
            "flags.on": True,
            "flags.off": False,
            "blob": b"\0\xff" * 200,
            "z": 3 - 4j,
            "empty": {},
            "list": [1, [2.5, "x"], None],
            "branches.2": 7,
        }
        assert reader.extras["flags.on"] is True


def test_a_file_of_to_bytes(path: Path) -> None:
    tree = {"layers": [{"w": np.float32([1, 2])}, {"w": np.float32([3])}], "count": np.int32(4)}
    path.write_bytes(flax.serialization.to_bytes(tree))
    with MsgpackReader(path) as reader:
        assert list(reader.tensors) == ["layers.0.w", "layers.1.w", "count"]
        assert reader.read("layers.1.w").tolist() == [3]
        assert reader.read("count") == 4


def test_integer_keys(path: Path) -> None:
    tree = {0: {"w": np.float32([1])}, 300: {"w": np.float32([2])}, -7: {"w": np.float32([3])}}
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    with MsgpackReader(path) as reader:
        assert {n: reader.read(n).tolist() for n in reader.tensors} == {
            "0.w": [1],
            "300.w": [2],
            "-7.w": [3],
        }


@pytest.mark.parametrize("every_length_long", [False, True])
def test_old_and_odd_encodings(path: Path, every_length_long: bool) -> None:
    """Raw strings for everything, as flax wrote with msgpack before 1.0; and the longest forms."""
    data = np.float32([1, 2]).tobytes()
    if every_length_long:
        array = b"\xdd\0\0\0\3\xdd\0\0\0\1\xcf\0\0\0\0\0\0\0\2\xdb\0\0\0\7float32\xc6\0\0\0\x08"
        array += data
        raw = b"\xdf\0\0\0\1\xdb\0\0\0\1a\xc9" + len(array).to_bytes(4, "big") + b"\1" + array
    else:
        raw = msgpack.packb(
            {"a": msgpack.ExtType(1, msgpack.packb(((2,), "float32", data), use_bin_type=False))},
            use_bin_type=False,
        )
        assert b"\xc4" not in raw
    path.write_bytes(raw)
    assert flax.serialization.msgpack_restore(raw)["a"].tolist() == [1, 2]
    assert read_all(path) == {"a": bits(np.float32([1, 2]))}


@pytest.mark.skipif(not FIXTURE.exists(), reason="no tests/data/hf_flax_v4")
def test_a_file_of_transformers_4() -> None:
    raw = (FIXTURE / "flax_model.msgpack").read_bytes()
    assert looks_like(raw[:16])
    expected = flat(flax.serialization.msgpack_restore(raw))
    assert len(expected) == 41
    got = read_all(FIXTURE / "flax_model.msgpack")
    assert got == {n: bits(a) for n, a in expected.items()}
    twin = safetensors.numpy.load_file(FIXTURE / "model.safetensors")
    kernel = twin["bert.encoder.layer.0.attention.self.query.weight"].T
    assert got["bert.encoder.layer.0.attention.self.query.kernel"][2] == kernel.tobytes()


keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | keys
plain |= st.binary(max_size=300) | st.lists(st.integers(), max_size=0)
arrays_ = st.builds(
    noise,
    st.sampled_from(CODES),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.integers(0, 99),
)


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(
        keys, st.recursive(plain | arrays_, lambda t: st.dictionaries(keys, t, max_size=4))
    )
)
def test_reads_any_tree(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    def leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        if isinstance(tree, dict) and (tree or not path):
            for key, value in tree.items():
                yield from leaves(value, (*path, key))
        else:
            yield ".".join(path), tree

    path = tmp_path_factory.mktemp("tree") / "x"
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    expected = list(leaves(tree, ()))
    if len(dict(expected)) < len(expected):
        with pytest.raises(CorruptInput, match="two things are named"):
            MsgpackReader(path)
        return
    with MsgpackReader(path) as reader:
        got = {n: bits(reader.read(n)) for n in reader.tensors} | {
            n: repr(x) for n, x in reader.extras.items()
        }
    assert got == {n: bits(x) if isinstance(x, np.ndarray) else repr(x) for n, x in expected}


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text("ab.é", max_size=4), arrays_, max_size=5), st.integers(1, 64))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray], chunk: int
) -> None:
    path = tmp_path_factory.mktemp("round") / "x"
    clash = any(a != b and b.startswith(f"{a}.") for a in arrays for b in arrays)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flax_msgpack, "MAX_CHUNK_SIZE", chunk)
        patch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk)
        if clash:
            with pytest.raises(UsageError, match="cannot stand beside"):
                write(path, arrays)
            return
        assert write(path, arrays) == flax.serialization.msgpack_serialize(nested(arrays))
    assert read_all(path) == {n: bits(a) for n, a in arrays.items()}


def test_reads_no_tensor_bytes_for_the_header(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, {f"{i}.w": noise("F32", (250_000,)) for i in range(8)})
    taken = []
    preadv = os.preadv

    def counting(fd: int, buffers: list[Any], offset: int) -> int:
        taken.append(sum(len(b) for b in buffers))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    with MsgpackReader(path) as reader:
        assert len(reader.tensors) == 8
    assert sum(taken) < 50_000 < path.stat().st_size // 100


def test_beyond_two_gib(path: Path) -> None:
    size = 2**31 + 12
    header = {"a": TensorInfo("F32", (size // 4,)), "b": TensorInfo("U8", (3,))}
    with MsgpackWriter(path, header, {}) as writer:
        writer.write("b", np.array([1, 2, 3], np.uint8))  # `a` stays a hole
    assert path.stat().st_size > size
    assert path.stat().st_blocks * 512 < 2**20
    with MsgpackReader(path) as reader:
        assert reader.tensors == header
        assert reader.read("b").tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a.b"], "a.b cannot stand beside a "),
        (["a.b", "a"], "a cannot stand beside a.b "),
        (["a.b.c", "x", "a"], "a cannot stand beside a.b.c "),
        (["a", "x", "a.b.c.d"], "a.b.c.d cannot stand beside a "),
        (["a\ud800"], r"'a\\ud800' in a tensor's name is not valid Unicode"),
        (["a." * 100], r"a\.a\.a\..* cannot be a path"),
        ([f"a.{CHUNKED}"], f"a.{CHUNKED} cannot be a path"),
    ],
)
def test_writer_refuses_names(path: Path, names: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as e:
        MsgpackWriter(path, {n: TensorInfo("F32", ()) for n in names}, {})
    assert e.value.exit_code == 2
    assert not path.exists()


def test_the_deepest_name_is_read_again(path: Path) -> None:
    name = ".".join("a" * 100)
    write(path, {name: np.zeros(1)})
    assert list(read_all(path)) == [name]


def test_mode_and_sync(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    before = os.umask(0o022)
    try:
        raw = write(path, {"a": np.zeros(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert synced == [len(raw)]


def test_truncation_is_seen(path: Path, everything: dict[str, np.ndarray]) -> None:
    raw = write(path, everything)
    for n in [*range(0, len(raw), 10), len(raw) - 1]:
        path.write_bytes(raw[:n])
        with pytest.raises(CorruptInput, match=r"x\.msgpack.* bytes are due at byte"):
            MsgpackReader(path)
    path.write_bytes(raw + b"\xc0")
    with pytest.raises(CorruptInput, match="1 bytes follow its end"):
        MsgpackReader(path)


def test_truncation_under_an_open_reader(path: Path) -> None:
    write(path, {"a": np.zeros(100)})
    with MsgpackReader(path) as reader:
        os.truncate(path, 200)
        with pytest.raises(CorruptInput, match=r"a: the file ends .* too early"):
            reader.read("a")


def ext(*triple: Any, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb(triple))


ONE = ext([1], "uint8", b"x")


def chunked(**changes: Any) -> bytes:
    tree = {CHUNKED: True, "shape": {"0": 2}, "chunks": {"0": ONE, "1": ONE}} | changes
    return packed(w={k: v for k, v in tree.items() if v is not ...})


def packed(**tree: Any) -> bytes:
    result: bytes = msgpack.packb(tree)
    return result


HOSTILE: list[Any] = [
    pytest.param(raw, message, id=case)
    for case, raw, message in [
        ("nothing", b"", "1 bytes are due"),
        ("a number", b"\x01", "holds one value and not a map"),
        ("a list", b"\x91\x01", "holds one value and not a map"),
        ("an array", msgpack.packb(ONE), "holds one value and not a map"),
        ("a bare chunked array", chunked()[3:], "holds one value and not a map"),
        ("never used", b"\x81\xa1w\xc1", "w: byte 3 is 0xc1"),
        ("2^32 keys", b"\xdf\xff\xff\xff\xff", "8589934590 bytes are due"),
        ("2^32 items", b"\x81\xa1w\xdd\xff\xff\xff\xff", "w: 4294967295 bytes are due"),
        ("4 GiB of text", b"\x81\xa1w\xdb\xff\xff\xff\xff", "w: 4294967295 bytes are due"),
        ("4 GiB of bytes", b"\x81\xa1w\xc6\xff\xff\xff\xff", "w: 4294967295 bytes are due"),
        ("4 GiB of array", b"\x81\xa1w\xc9\xff\xff\xff\xff\x01", "w: 4294967295 bytes are due"),
        ("deep lists", b"\x81\xa1w" + b"\x91" * 10_000 + b"\0", "nested more than 100"),
        ("deep maps", b"\x81\xa1w" * 10_000 + b"\0", "nested more than 100"),
        ("key twice", b"\x82\xa1w\x01\xa1w\x02", "the key 'w' stands twice"),
        ("key twice, 1 and '1'", b"\x82\xa11\x01\x01\x02", "the key '1' stands twice"),
        ("key null", b"\x81\xc0\x01", "a key is neither string nor integer"),
        ("key list", b"\x81\x90\x01", "a key is neither string nor integer"),
        ("key bytes", b"\x81\xc4\x01w\x01", "a key is neither string nor integer"),
        ("key not UTF-8", b"\x81\xa1\xff\x01", "a string is not UTF-8"),
        ("text not UTF-8", b"\x81\xa1w\xa1\xff", "w: a string is not UTF-8"),
        ("surrogate", b"\x81\xa3\xed\xa0\x80\x01", "a string is not UTF-8"),
        ("name twice", packed(**{"a.b": ONE, "a": {"b": ONE}}), "two things are named a.b"),
        ("name twice, plain", packed(**{"a.b": 1, "a": {"b": ONE}}), "two things are named a.b"),
        ("unknown extension", packed(w=msgpack.ExtType(4, b"")), "w: extension type 4"),
        ("timestamp", b"\x81\xa1w\xd6\xff1234", "w: extension type -1"),
        ("no triple", packed(w=ext(1, 2)), "w: an array is not a triple"),
        ("no list", packed(w=msgpack.ExtType(1, b"\x01")), "w: the array is of msgpack type int"),
        ("empty", packed(w=msgpack.ExtType(1, b"")), "w: 1 bytes are due"),
        ("shape text", packed(w=ext("ab", "uint8", b"x")), "w: the shape is of msgpack type str"),
        ("shape true", packed(w=ext([True], "uint8", b"x")), "w: the shape's entry is"),
        ("shape float", packed(w=ext([1.0], "uint8", b"x")), "w: the shape's entry is"),
        ("shape negative", packed(w=ext([-1, -1], "uint8", b"x")), r"the shape \(-1, -1\)|needs"),
        ("negative and empty", packed(w=ext([-1, 0], "uint8", b"")), r"w: .* shape \(-1, 0\)"),
        ("shape absurd", packed(w=ext([2**62, 2**62, 0], "uint8", b"")), "w: .* the shape"),
        ("65 axes", packed(w=ext([1] * 65, "uint8", b"x")), "w: an array has 65 axes"),
        ("too short", packed(w=ext([3], "uint8", b"xy")), r"w: U8 \(3,\) needs 3 bytes, 2 are"),
        ("too long", packed(w=ext([1], "uint8", b"xy")), r"w: U8 \(1,\) needs 1 bytes, 2 are"),
        ("dtype a number", packed(w=ext([1], 3, b"x")), "w: the dtype is of msgpack type int"),
        ("bytes a number", packed(w=ext([1], "uint8", 3)), "w: the bytes are of msgpack type"),
        ("int4", packed(w=ext([1], "int4", b"x")), "w has dtype 'int4', .*\nknown are .*bfloat16"),
        ("object", packed(w=ext([1], "object", b"x")), "w has dtype 'object'"),
        ("dtype with a zero", packed(w=ext([1], "uint8\0", b"x")), r"w has dtype 'uint8\\x00'"),
        (
            "extension too long",
            packed(w=msgpack.ExtType(1, ONE.data + b"?")),
            "w: an extension ends at byte 18, its length says 19",
        ),
        (
            "extension too short",
            b"\x81\xa1w\xc7\x05\x01" + ONE.data,
            "w: an extension ends at byte 18, its length says 11",
        ),
        ("complex of one", packed(w=ext(1.0, code=2)), "w: a complex number is not a pair"),
        ("complex of text", packed(w=ext(1.0, "i", code=2)), "w: the imaginary part is"),
        ("chunk missing", chunked(chunks={"1": ONE}), "w: the chunks of a .* not numbered"),
        ("last chunk missing", chunked(chunks={"0": ONE}), r"w: its chunks do not fill .*\(2,\)"),
        ("chunk too many", chunked(shape={"0": 1}), r"w: its chunks do not fill"),
        ("no chunks", chunked(chunks={}), "w: a chunk is missing"),
        ("no chunks entry", chunked(chunks=...), "w: a chunked array has the keys"),
        ("no shape entry", chunked(shape=...), "w: a chunked array has the keys"),
        ("something else", chunked(more=1), "w: a chunked array has the keys"),
        ("chunks a list", chunked(chunks=[ONE, ONE]), "w: the chunks of a chunked array"),
        ("shape a number", chunked(shape=2), "w: the shape of a chunked array"),
        ("chunk a number", chunked(chunks={"0": ONE, "1": 2}), "w: a chunk is missing or not"),
        ("chunk 2-d", chunked(chunks={"0": ext([2, 1], "uint8", b"xy")}), "w: .* not a one-dim"),
        ("chunk dtypes", chunked(chunks={"0": ONE, "1": ext([1], "int8", b"x")}), "several dtypes"),
        ("chunked negative", chunked(shape={"0": -1, "1": -2}), r"w: .* the shape \(-1, -2\)"),
        ("chunked true", chunked(shape={"0": 2, "1": True}), "w: a chunked array has the shape"),
        ("chunked 65 axes", chunked(shape={str(i): 1 for i in range(65)}), "has the shape"),
    ]
]


@pytest.mark.parametrize(("raw", "message"), HOSTILE)
def test_hostile_files(path: Path, raw: bytes, message: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(CorruptInput, match=message) as e:
        MsgpackReader(path)
    assert e.value.exit_code == 5
    assert e.value.problem.startswith(str(path))
    assert len(str(e.value).splitlines()) == 2
    assert len(str(e.value)) < 1000


def test_chunked_helper_is_itself_sound(path: Path) -> None:
    path.write_bytes(chunked())
    assert read_all(path) == {"w": bits(np.frombuffer(b"xx", np.uint8))}


def test_a_file_of_plain_data_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msgpack_scan, "_MAX_HEADER", 1000)
    path.write_bytes(packed(w=b"x" * 2000))
    with pytest.raises(
        CorruptInput, match="w: more than 1000 bytes of the file belong to no tensor"
    ):
        MsgpackReader(path)
    path.write_bytes(packed(w=ext([2000], "uint8", b"x" * 2000)))
    assert read_all(path)["w"][1] == (2000,)


def test_random_damage(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flax_msgpack, "MAX_CHUNK_SIZE", 16)
        arrays = {f"p.{c}.w": noise(c, (2, 3)) for c in CODES}
        raw = write(path, arrays)
    rng = random.Random(0)
    refused = 0
    for _ in range(1000):
        damaged = bytearray(raw)
        for _ in range(rng.choice([1, 1, 2, 10])):
            damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            with MsgpackReader(path) as reader:
                for name, info in reader.tensors.items():
                    assert reader.read(name).shape == info.shape
        except ZooError:
            refused += 1
    assert 300 < refused < 1000


def test_random_bytes(path: Path) -> None:
    rng = random.Random(0)
    for _ in range(500):
        path.write_bytes(b"\x83\xa1w" + rng.randbytes(rng.randrange(60)))
        with contextlib.suppress(ZooError):
            read_all(path)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"\x81\xa1w\xc7", True),
        (b"\x8f\xbf" + b"w" * 31, True),
        (b"\x81\xd9\x20", True),
        (b"\x81\xda\1\0", True),
        (b"\xde\0\x10\xa1w", True),
        (b"\xdf\0\1\0\0\xa1w", True),
        (b"", False),
        (b"\x81", False),
        (b"\xde\0", False),
        (b"\xdf\0\1\0\0", False),
        (b"\x80", False),
        (b"\x80\x02}q\0", False),  # a pickle, as torch.save once wrote
        (b"PK\3\4", False),
        (b"\x91\xa1w", False),
        (b"\x89HDF\r\n\x1a\n", False),
        (b"\x08\x07\x12\x07pytorch", False),  # ONNX
        (b'\x88\xa1\0\0\0\0\0\0{"a"', False),  # safetensors, with a header of 0xa188 bytes
        (b'\x88\xa1\0\1\0\0\0\0{"a"', False),
    ],
)
def test_looks_like(start: bytes, expected: bool) -> None:
    assert looks_like(start) is expected


def test_looks_like_what_flax_writes(path: Path, everything: dict[str, np.ndarray]) -> None:
    assert looks_like(write(path, everything)[:9])
    assert looks_like(flax.serialization.to_bytes({str(i): i for i in range(70_000)})[:9])
