"""Hostile .pt files: pickles that would run something, zips that say two things, endless views."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

from hostile import Cases, file

STORAGE = b"ctorch\nFloatStorage\n"


def text(value: str) -> bytes:
    """A string as an opcode."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """An integer, likewise."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(raw)) + raw


def numbers(*values: int) -> bytes:
    """A tuple of them."""
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    size: tuple[int, ...] = (1,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    numel: int = 1,
    key: str = "0",
    kind: bytes = STORAGE,
) -> bytes:
    """A view of a storage."""
    told = b"(" + text("storage") + kind + text(key) + text("cpu") + number(numel) + b"tQ"
    rest = number(offset) + numbers(*size) + numbers(*stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + told + rest + b"tR"


def named(value: bytes, name: str = "a.weight") -> bytes:
    """A state dict of one value."""
    return b"\x80\x02}" + text(name) + value + b"s."


def pt(
    pickle: bytes,
    storages: dict[str, bytes] | None = None,
    more: dict[str, bytes] | None = None,
    how: int = zipfile.ZIP_STORED,
) -> bytes:
    """The zip file around it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as z:
        z.writestr("a/data.pkl", pickle)
        z.writestr("a/version", "3\n")
        for key, data in ({"0": bytes(4)} if storages is None else storages).items():
            z.writestr(f"a/data/{key}", data)
        for name, data in (more or {}).items():
            z.writestr(name, data)
    return out.getvalue()


def call(module: str, name: str, argument: str = "touch canary") -> bytes:
    """What would call module.name(argument)."""
    return named(f"c{module}\n{name}\n(".encode() + text(argument) + b"tR")


def _calls() -> dict[str, bytes]:
    told = {
        "os.system": call("os", "system"),
        "posix.system": call("posix", "system"),
        "subprocess.Popen": call("subprocess", "Popen"),
        "eval": call("builtins", "eval", "open('canary','w')"),
        "exec": call("builtins", "exec", "open('canary','w')"),
        "__import__": call("builtins", "__import__", "evil"),
        "runpy": call("runpy", "run_path", "evil.py"),
        "importlib": call("importlib", "import_module", "evil"),
        "webbrowser": call("webbrowser", "open", "http://localhost/"),
        "shutil.rmtree": call("shutil", "rmtree", "canary"),
        "builtins.open": call("builtins", "open", "canary"),
        "getattr": call("builtins", "getattr", "__class__"),
        "torch.load": call("torch", "load", "canary"),
        "pickle.loads": call("pickle", "loads", "x"),
        "socket": call("socket", "create_connection", "localhost"),
        "numpy.load": call("numpy", "load", "canary"),
        "ctypes": call("ctypes", "CDLL", "evil.so"),
        "code.interact": call("code", "interact", "x"),
        "os.execv": call("os", "execv", "/bin/sh"),
        "INST": named(b"(" + text("touch canary") + b"ios\nsystem\n"),
        "OBJ": named(b"(cos\nsystem\n" + text("touch canary") + b"o"),
        "STACK_GLOBAL": named(text("os") + text("system") + b"\x93" + text("x") + b"\x85R"),
        "NEWOBJ_EX": named(b"cos\nsystem\n" + text("x") + b"\x85}\x92"),
        "in a dict that is dropped": named(b"cos\nsystem\n" + text("x") + b"\x85R0" + tensor()),
        "through copyreg": named(
            b"ccopyreg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR"
        ),
    }
    return {f"calls: {n}": pt(p) for n, p in told.items()}


def _malformed() -> dict[str, bytes]:
    mega = b"\x80\x02]q\x00(" + text("x" * 1_000_000) + b"q\x01"
    loop = b"\x80\x02]q\x00h\x00ah\x00h\x00a."
    doubled = b"\x80\x02" + b")q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"."
    keyed = b"\x80\x02}(" + b")q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"NU."
    pickles = {
        "a megabyte a million times": mega + b"h\x01" * 1_000_000 + b"e.",
        "a list in itself": loop,
        "doubled 60 times": doubled,
        "a key doubled 60 times": keyed,
        "a hundred thousand marks": b"\x80\x02" + b"(" * 100_000 + b".",
        "100,000 lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "40,000 deep": b"\x80\x02" + b"(" * 40_000 + b"l" * 40_000 + b".",
        "no end": b"\x80\x02}",
        "empty": b"",
        "pops from nothing": b"\x80\x02.",
        "protocol 99": b"\x80\x63}.",
        "an unknown opcode": b"\x80\x02\xff.",
        "text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
        "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "a negative length": b"\x80\x02\x8b\xff\xff\xff\xff.",
        "a frame of 2^63": b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
        "memo 2^31": b"\x80\x02}r\xff\xff\xff\x7fj\xfe\xff\xff\x7f.",
        "an extension code": b"\x80\x02\x82\x01.",
        "10^5 wide keys": b"\x80\x02}("
        + b"".join(number((1 << 61) * i + (1 << 70)) + b"N" for i in range(1, 20_000)) + b"u.",
        "a decimal of a million digits": b"\x80\x02I" + b"9" * 1_000_000 + b"\n.",
    }  # fmt: skip
    return {f"pickle: {n}": pt(p) for n, p in pickles.items()}


def _tensors() -> dict[str, bytes]:
    told: dict[str, dict[str, Any]] = {
        "2^40 elements of stride 0": {"size": (1 << 40,), "stride": (0,)},
        "2^62 by 4": {"size": (1 << 62, 4), "stride": (0, 0)},
        "a negative size": {"size": (-1,)},
        "a negative stride": {"size": (2,), "stride": (-1,), "offset": 1, "numel": 2},
        "a negative offset": {"offset": -1},
        "beyond the storage": {"size": (2,)},
        "an offset of 2^63": {"offset": 1 << 63},
        "a size of 2^80": {"size": (1 << 80,)},
        "strides too few": {"size": (1, 1)},
        "100 axes": {"size": (1,) * 100, "stride": (1,) * 100},
        "a storage of 2^62": {"numel": 1 << 62},
        "a storage that is not there": {"key": "7"},
        "a storage outside": {"key": "../../../canary"},
        "a storage of objects": {"kind": b"c__builtin__\nobject\n"},
        "an unknown storage": {"kind": b"ctorch\nFloatFloatStorage\n"},
        "overlapping itself": {"size": (1 << 20, 1 << 20), "stride": (0, 0)},
    }
    return {f"tensor: {n}": pt(named(tensor(**t))) for n, t in told.items()}


def _zips() -> dict[str, bytes]:
    good = pt(named(tensor()))
    end = good.rindex(b"PK\5\6")
    short = pt(named(tensor()), {"0": bytes(3)})
    local = good.replace(b"a/data/0", b"a/data/1", 1)
    return {
        "zip: deflated": pt(
            named(tensor((1 << 20,), numel=1 << 20)), {"0": bytes(4 << 20)}, None, 8
        ),
        "zip: one record twice": _twice(),
        "zip: two checkpoints": pt(named(tensor()), None, {"b/data.pkl": named(tensor())}),
        "zip: no pickle": pt(named(tensor())).replace(b"data.pkl", b"dada.pkl"),
        "zip: cut": good[: len(good) // 2],
        "zip: no directory": good[:end],
        "zip: a directory of 4 GB": good[: end + 12] + b"\xff" * 8 + good[end + 20 :],
        "zip: 65,535 records": good[: end + 8] + b"\xff" * 4 + good[end + 12 :],
        "zip: two names of one record": local,
        "zip: a storage too short": short,
        "zip: encrypted": good.replace(b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0"),
        "legacy: cut": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        "legacy: two of three pickles": (
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
        ),
        "bare: a pickle that calls": call("os", "system"),
        "bare: protocol 0": b"cos\nsystem\n(S'touch canary'\ntR.",
    }  # fmt: skip


def _twice() -> bytes:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pt(named(tensor()), None, {"a/data/0": bytes(4)})


def cases() -> Cases:
    """The class."""
    told = _calls() | _malformed() | _tensors() | _zips()

    def bomb(folder: Path) -> Path:
        path = folder / "a.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("a/data.pkl", bytes(1 << 26))
        return path

    return {n: file("a.pt", x) for n, x in told.items()} | {"zip: a bomb": bomb}
