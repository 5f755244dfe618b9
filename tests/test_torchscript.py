"""TorchScript archives: their weights as torch.jit.load has them, their programs unread; and 40
that mean harm."""

from __future__ import annotations

import pickle
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import convert
from convert.runtime.torch_layout import derive_layout
from zoo.containers import open_checkpoint
from zoo.containers.errors import CorruptInput, UnsafeInput, UsageError, ZooError


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.bn = nn.BatchNorm1d(4)
        self.sizes = [1, 2]
        self.rate = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.fc(x)) * self.rate + self.sizes[0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Inner(), nn.ReLU(), nn.Linear(4, 3))
        self.tied = nn.Linear(4, 3)
        self.tied.weight = self.layers[2].weight
        self.scale = nn.Parameter(torch.ones(3).mul_(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * self.scale + self.tied(torch.relu(self.layers[0](x)))


def saved(path: Path, how: str) -> tuple[Path, dict[str, torch.Tensor]]:
    net = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.trace(net, torch.ones(2, 3)) if how == "traced" else torch.jit.script(net)
        torch.jit.save(torch.jit.freeze(made) if how == "frozen" else made, str(path))
        return path, torch.jit.load(str(path)).state_dict()


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_the_weights_are_those_of_torch(tmp_path: Path, how: str) -> None:
    path, state = saved(tmp_path / "net.pt", how)
    with open_checkpoint(path) as reader:
        assert reader.container == "torch"
        assert list(reader.tensors) == list(state)
        assert reader.ties == {"tied.weight": "layers.2.weight"}
        assert not reader.extras
        assert "its program is not" in reader.notices[0]
        for name, x in state.items():
            assert reader.read(name).tobytes() == x.numpy().tobytes()
    layout, _ = derive_layout(Net())
    convert.convert(path, tmp_path / "net.msgpack", layout=layout)
    convert.convert(tmp_path / "net.msgpack", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[n], x) for n, x in state.items())


def test_a_frozen_one_has_no_names_any_more(tmp_path: Path) -> None:
    path, _ = saved(tmp_path / "net.pt", "frozen")
    with pytest.raises(UsageError, match="a frozen one"):
        open_checkpoint(path)


# Files that mean harm. A pickle is written opcode by opcode.


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def number(n: int) -> bytes:
    return b"\x8a" + bytes([9]) + n.to_bytes(9, "little", signed=True)


def ints(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def stored(key: str = "0", numel: int = 2, kind: str = "FloatStorage") -> bytes:
    inner = word("storage") + name("torch", kind) + word(key) + word("cpu") + number(numel)
    return b"(" + inner + b"tQ"


def tensor(storage: bytes = b"", offset: int = 0, shape: bytes = b"", stride: bytes = b"") -> bytes:
    parts = (storage or stored()) + number(offset) + (shape or ints(2)) + (stride or ints(1))
    hooks = name("collections", "OrderedDict") + b")R"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + parts + b"\x89" + hooks + b"tR"


def module(attributes: dict[str, bytes], kind: str = "Net") -> bytes:
    items = b"".join(word(k) + v for k, v in attributes.items())
    return name("__torch__", kind) + b")\x81}(" + items + b"ub"


def call(of: str, attribute: str, *arguments: bytes) -> bytes:
    return name(of, attribute) + b"(" + b"".join(arguments) + b"tR"


def nested(depth: int) -> bytes:
    made = module({"w": tensor()})
    for _ in range(depth):
        made = module({"a": made})
    return made


def script(
    body: bytes, files: dict[str, bytes] | None = None, **more: bytes
) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        every = {
            "net/data.pkl": b"\x80\x02" + body + b".",
            "net/code/__torch__.py": b"import os\nos.system('touch /tmp/ran')\n",
            "net/constants.pkl": pickle.dumps((), 2),
            "net/data/0": bytes(8),
            "net/version": b"3\n",
            "net/byteorder": b"little",
        }
        every |= files or {}
        with zipfile.ZipFile(path, "w") as z:
            for file, raw in every.items():
                kind = zipfile.ZIP_DEFLATED if "/code/" in file else zipfile.ZIP_STORED
                z.writestr(file, raw, kind)

    return write


def deflated(path: Path) -> None:
    script(module({"w": tensor()}))(path)
    with zipfile.ZipFile(path, "a") as z:
        z.writestr("net/data/1", bytes(1 << 20), zipfile.ZIP_DEFLATED)


def twice(path: Path) -> None:
    script(module({"w": tensor()}))(path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as z:
        warnings.simplefilter("ignore")
        z.writestr("net/data/0", bytes(8))


def flipped(path: Path) -> None:
    script(module({"w": tensor()}), {"net/data/0": b"\x01" * 8})(path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"\x01" * 8)] ^= 0xFF
    path.write_bytes(raw)


def cut(path: Path) -> None:
    script(module({"w": tensor()}))(path)
    path.write_bytes(path.read_bytes()[:-40])


GOOD = module({"w": tensor(), "training": b"\x89", "inner": module({"b": tensor()}, "Inner")})
ODD = module({"w": tensor(), "x": call("__torch__.os", "system", word("true"))})
UNSAFE = {
    "code: os.system": module({"w": call("os", "system", word("touch /tmp/ran"))}),
    "code: posix": module({"w": call("posix", "system", word("true"))}),
    "code: eval": module({"w": call("builtins", "eval", word("1"))}),
    "code: exec of Python 2": module({"w": call("__builtin__", "execfile", word("x"))}),
    "code: subprocess": module({"w": call("subprocess", "Popen", word("true"))}),
    "code: torch.load": module({"w": call("torch", "load", word("x"))}),
    "code: torch.jit.load": module({"w": call("torch.jit", "load", word("x"))}),
    "code: torch.jit's other builders": module(
        {"w": call("torch.jit._pickle", "build_tensor_from_id", number(0))}
    ),
    "code: by way of another module": module({"w": call("torch.jit._pickle", "os.system")}),
    "code: getattr": module({"w": call("builtins", "getattr", word("a"), word("b"))}),
    "code: the state of a class": name("__torch__", "Net") + b"}(" + word("a") + b"K\x01ub",
    "code: runpy": module({"w": call("runpy", "run_path", word("x"))}),
    "code: in a list's type": module({"w": call("torch.hub", "load", word("x"))}),
    "code: pickle": module({"w": call("pickle", "loads", word("x"))}),
    "code: importlib": module({"w": call("importlib", "import_module", word("os"))}),
}
UNSAFE |= {
    "dims: 2^62": module({"w": tensor(shape=ints(1 << 62), stride=ints(1))}),
    "dims: 2^40 of stride 0": module({"w": tensor(shape=ints(1 << 40), stride=ints(0))}),
}
CORRUPT = {
    "dims: negative": module({"w": tensor(shape=ints(-2))}),
    "dims: beyond the storage": module({"w": tensor(shape=ints(3))}),
    "dims: an offset beyond it": module({"w": tensor(offset=1)}),
    "dims: a negative offset": module({"w": tensor(offset=-1)}),
    "dims: a negative stride": module({"w": tensor(stride=ints(-1))}),
    "dims: more shape than stride": module({"w": tensor(shape=ints(1, 2))}),
    "dims: a storage of 2 GB": module({"w": tensor(stored(numel=1 << 29), shape=ints(1 << 29))}),
    "storage: not there": module({"w": tensor(stored("7"))}),
    "storage: of no type": module({"w": tensor(stored(kind="NoStorage"))}),
    "storage: another length": module({"w": tensor(stored(numel=5))}),
    "storage: up": module({"w": tensor(stored("../../secret"))}),
    "pickle: nested 200 deep": nested(200),
    "pickle: holds itself": name("__torch__", "Net")
    + b")\x81q\x06}("
    + word("w")
    + tensor()
    + word("self")
    + b"h\x06ub",
    "pickle: an opcode of none": b"\xff",
    "pickle: without an end": module({"w": tensor()})[:-1] + b"(",
    "pickle: an empty stack": b"0",
    "pickle: a mark too many": b"(" * 2000,
    "pickle: a memo that was never": module({"w": b"h\x63"}),
    "pickle: an extension": module({"w": b"\x82\x01"}),
}
WRITTEN: dict[str, tuple[Callable[[Path], None], type[ZooError]]] = {
    **{n: (script(body), UnsafeInput) for n, body in UNSAFE.items()},
    **{n: (script(body), CorruptInput) for n, body in CORRUPT.items()},
    "archive: a record that expands": (deflated, UnsafeInput),
    "archive: a record twice": (twice, UnsafeInput),
    "archive: a byte that was flipped": (flipped, CorruptInput),
    "archive: cut short": (cut, CorruptInput),
    "archive: big-endian": (script(GOOD, {"net/byteorder": b"big"}), UsageError),
    "archive: a second pickle": (script(GOOD, {"two/data.pkl": b"\x80\x02}."}), CorruptInput),
}


def read_all(path: Path) -> None:
    with open_checkpoint(path) as reader:
        for tensor_name in reader.tensors:
            reader.read(tensor_name)


def test_the_good_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    script(GOOD)(path)
    with open_checkpoint(path) as reader:
        assert list(reader.tensors) == ["w", "inner.b"]
    script(ODD)(path)  # a class of the program's: a value, and no call
    with open_checkpoint(path) as reader:
        assert list(reader.tensors) == ["w"]


@pytest.mark.parametrize("harm", WRITTEN)
def test_is_refused_at_once(tmp_path: Path, harm: str) -> None:
    write, kind = WRITTEN[harm]
    path = tmp_path / "net.pt"
    write(path)
    begun = time.process_time()
    with pytest.raises(ZooError) as e:
        read_all(path)
    assert time.process_time() - begun < 1
    assert e.type is kind, e.value
    assert not Path("/tmp/ran").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt"]
