"""Containers: files and directories that hold named arrays. They know bytes, no models.

`open_checkpoint` recognises them by content. Each module here is one container: a Reader and, where
it makes sense, a Writer (see `zoo.containers.base`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from zoo.containers import filenames
from zoo.containers.base import Reader
from zoo.containers.committed import find, open_file
from zoo.containers.errors import CorruptInput, UsageError

_KNOWN = (
    "known are safetensors, torch .pt/.pth/.bin, sharded checkpoints by their *.index.json, "
    "ONNX, Flax msgpack and Orbax directories"
)
_NAME_MAX = 4096  # characters of a tensor's name
_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")
_OLD_PICKLE = re.compile(rb"[(\]}]*c[\w.]+\n[\w.]+\n")  # protocol 0 that begins with a global


def open_checkpoint(path: str | Path, prefer: str = "torch") -> Reader:
    """The Reader for whatever lies at `path`, recognised by content and not by name.

    A directory with checkpoints of both frameworks gives the one of the framework `prefer`, "torch"
    or "flax". Raises UsageError where there is nothing, CorruptInput where there is no checkpoint.
    """
    path = Path(path)
    where = find(path)
    if not where.exists():
        raise UsageError(f"{path} does not exist", "give the path of a file or a directory")
    reader = _open_directory(path, prefer) if where.is_dir() else _open_file(path)
    try:
        reader.first_state = reader.state()
        _check_names(reader)
    except BaseException:
        reader.close()
        raise
    return reader


def _check_names(reader: Reader) -> None:
    """CorruptInput for names that no checkpoint needs: they are copied, compared and shown."""
    longest = max((*reader.tensors, *reader.extras), key=len, default="")
    if len(longest) > _NAME_MAX:
        raise CorruptInput(
            f"{reader.path}: a name has {len(longest)} characters, at most {_NAME_MAX} are read",
            "no checkpoint needs them: check where it is from",
        )


def _open_directory(path: Path, prefer: str) -> Reader:
    from zoo.containers.orbax_dir import OrbaxReader, is_orbax

    if any((path / name).exists() for name in (filenames.ORBAX_TREE, filenames.ORBAX_CHECKPOINT)):
        return OrbaxReader(path)
    ours, theirs = filenames.TORCH_PATTERNS, filenames.FLAX_PATTERNS
    patterns = (*theirs, *ours) if prefer == "flax" else (*ours, *theirs)
    for pattern in patterns:
        found = _models(path, pattern)
        if len(found) == 1:
            reader = _open_file(found[0])
            others = sorted({p.name for q in patterns for p in _models(path, q)})
            if len(others) > 1 and not pattern.endswith(filenames.INDEX):
                reader.notices.append(f"of {', '.join(others[:5])} in {path}, took {found[0].name}")
            return reader
        if found:
            names = ", ".join(f.name for f in found[:4]) + (", ..." if len(found) > 4 else "")
            raise UsageError(
                f"{path} holds {len(found)} checkpoints and no index: {names}", "name one of them"
            )
    if is_orbax(path):  # by what lies in its subdirectories, such as numbered steps
        return OrbaxReader(path)
    inside = sorted(f.name for f in path.iterdir())[:5]
    raise CorruptInput(
        f"{path} holds no checkpoint"
        + (f"; it holds {', '.join(inside)}" if inside else ": it is empty"),
        _KNOWN,
    )


def _models(folder: Path, pattern: str) -> list[Path]:
    """The files that match, but for those that a training run keeps beside its weights."""
    return sorted(p for p in folder.glob(pattern) if not filenames.is_training(p.name))


def _open_file(path: Path) -> Reader:
    if not find(path).is_file():
        raise UsageError(f"{path} is not a regular file", "give the path of a file or a directory")
    with open(open_file(path), "rb") as f:
        start = f.read(512)
    if not start:
        raise CorruptInput(f"{path} is empty", "copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise CorruptInput(
            f"{path} is a git-lfs pointer, not the file itself",
            "fetch the file: git lfs pull",
        )
    for recognises, opener in _FILES:
        if recognises(start):
            return opener(path)
    kind = "a text file" if _is_text(start) else "no checkpoint that zooconvert knows"
    raise CorruptInput(f"{path} is {kind}", _KNOWN)


def _is_safetensors(start: bytes) -> bool:
    return len(start) > 8 and start[8:9] == b"{" and start[6:8] == b"\0\0"


def _is_torch(start: bytes) -> bool:
    legacy = (
        start[:1] == b"\x80" and start[1:2] <= b"\x05" and b"\x8a\nl\xfc\x9cF\xf9" in start[:24]
    )
    return start.startswith(b"PK\x03\x04") or legacy or start[257:262] == b"ustar"


def _is_pickle(start: bytes) -> bool:
    return (start[:1] == b"\x80" and start[1:2] in _PROTOCOLS) or bool(_OLD_PICKLE.match(start))


def _open_pickle(path: Path) -> Reader:
    """No checkpoint, but it is said if loading it would have run something (UnsafeInput)."""
    from zoo.containers.torch_file.machine import load

    with path.open("rb") as stream:
        load(stream, str(path))
    raise CorruptInput(
        f"{path} is a pickle that torch.save did not write",
        "load it where it was written, and save its state_dict() with torch.save",
    )


def _is_index(start: bytes) -> bool:
    return start.lstrip()[:1] == b"{"


def _open_safetensors(path: Path) -> Reader:
    from zoo.containers.safetensors_file import SafetensorsReader

    return SafetensorsReader(path)


def _open_torch(path: Path) -> Reader:
    from zoo.containers.torch_file import TorchReader

    return TorchReader(path)


def _open_msgpack(path: Path) -> Reader:
    from zoo.containers.flax_msgpack import MsgpackReader

    return MsgpackReader(path)


def _open_index(path: Path) -> Reader:
    if not path.name.endswith(filenames.INDEX) and b'"weight_map"' not in path.read_bytes():
        raise CorruptInput(f"{path} is a JSON file, not a checkpoint", _KNOWN)
    from zoo.containers.sharded import ShardedReader

    return ShardedReader(path, _open_file)


def _is_msgpack(start: bytes) -> bool:
    from zoo.containers.flax_msgpack import looks_like

    return looks_like(start)


def _is_onnx(start: bytes) -> bool:
    from zoo.containers.onnx_graph import looks_like

    return looks_like(start)


def _open_onnx(path: Path) -> Reader:
    from zoo.containers.onnx_graph import OnnxReader

    return OnnxReader(path)


def _is_text(start: bytes) -> bool:
    return all(b >= 32 or b in b"\t\n\r\f" for b in start)


_FILES: tuple[tuple[Callable[[bytes], bool], Callable[[Path], Reader]], ...] = (
    (_is_safetensors, _open_safetensors),
    (_is_torch, _open_torch),
    (_is_pickle, _open_pickle),
    (_is_index, _open_index),
    (_is_msgpack, _open_msgpack),
    (_is_onnx, _open_onnx),
)
