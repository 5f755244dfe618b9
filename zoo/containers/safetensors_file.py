"""safetensors: 8 bytes of header length, a JSON header, then the tensors' bytes.

Own reader and writer because the library's NumPy side writes strided arrays in memory order,
cannot read FP8, accepts duplicate names, never syncs and makes files that only the owner may
read. Held against the library in tests.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from zoo.containers import dtypes
from zoo.containers.base import TensorInfo, pread, put
from zoo.containers.committed import open_file
from zoo.containers.errors import CorruptInput, UsageError
from zoo.containers.spans import Span, SpanReader, SpanWriter

_SMALL_HEADER = 1 << 22  # bytes that a header may have whatever it describes
_MAX_HEADER = 100_000_000  # the library's own limit
_AGAIN = "it is damaged or was written wrongly: copy or download it again"

# The dtypes of the format, in the order in which the library lays them out. Element sizes only
# fall, so that every tensor is aligned to its own.
_ORDER = (
    "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 "
    "F8_E5M2FNUZ F8_E4M3FNUZ F8_E8M0 F8_E4M3 F8_E5M2 I8 U8 BOOL"
)
RANK = {code: rank for rank, code in enumerate(_ORDER.split())}


class SafetensorsReader(SpanReader):
    """One `.safetensors` file. Raises CorruptInput for a header that the format forbids."""

    container: ClassVar[str] = "safetensors"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._fd = open_file(path)
        try:
            self._parse_header()
        except BaseException:
            self.close()
            raise

    def _parse_header(self) -> None:
        size = os.fstat(self._fd).st_size
        length = struct.unpack("<Q", pread(self._fd, 8, 0, str(self.path)).tobytes())[0]
        if length > min(_MAX_HEADER, size - 8):
            raise CorruptInput(
                f"{self.path}: the header claims {length} bytes, the file has {size}",
                "it is truncated or no safetensors file: copy or download it again",
            )
        if length > max(_SMALL_HEADER, 8 * (size - 8 - length)):
            raise CorruptInput(
                f"{self.path}: a header of {length} bytes for {size - 8 - length} of tensors",
                "no checkpoint needs it: check where it is from",
            )
        raw = pread(self._fd, length, 8, str(self.path)).tobytes()
        if raw[:1] != b"{":
            raise CorruptInput(f"{self.path}: the header is not a JSON object", _AGAIN)
        header = parse_json(raw, f"{self.path}: the header")
        self.metadata = self._parse_metadata(header.pop("__metadata__", {}))
        data = 8 + length
        spans = []
        for name, item in header.items():
            self.tensors[name], start, stop = self._parse_item(name, item)
            self._spans[name] = (Span(data + start, stop - start),)
            spans.append((start, stop, name))
        end = 0
        for start, stop, name in sorted(spans):
            if start != end:
                raise CorruptInput(
                    f"{self.path}: {name} starts at byte {start}, where {end} is expected", _AGAIN
                )
            end = stop
        if data + end != size:
            raise CorruptInput(
                f"{self.path}: the tensors need {data + end} bytes, the file has {size}",
                "it is truncated or has something appended: copy or download it again",
            )

    def _parse_metadata(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise CorruptInput(f"{self.path}: __metadata__ is not a map of strings", _AGAIN)
        return metadata

    def _parse_item(self, name: str, item: Any) -> tuple[TensorInfo, int, int]:
        match item:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, stop]} if (
                type(start) is type(stop) is int
            ):
                pass
            case _:
                raise CorruptInput(f"{self.path}: {name} has a malformed entry", _AGAIN)
        if dtype not in RANK:
            raise CorruptInput(
                f"{self.path}: {name} has dtype {dtype!r}, which this version does not carry",
                f"known are {' '.join(RANK)}",
            )
        if not _possible(shape, dtypes.itemsize(dtype)):
            raise CorruptInput(f"{self.path}: {name} has the shape {shape}", _AGAIN)
        info = TensorInfo(dtype, tuple(shape))
        if start < 0 or stop - start != info.nbytes:
            raise CorruptInput(
                f"{self.path}: {name} needs {info.nbytes} bytes, its range has {stop - start}",
                _AGAIN,
            )
        return info, start, stop


class SafetensorsWriter(SpanWriter):
    """One `.safetensors` file, the same bytes for the same tensors in whatever order written.

    They are the library's own bytes too, where metadata has at most one key: of several, the
    library's order changes from run to run, ours is sorted.
    """

    container: ClassVar[str] = "safetensors"

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        resumed: bool = False,
    ) -> None:
        super().__init__(path, tensors, metadata)
        check_tensors(self.tensors)
        header, offsets = _layout(self.tensors, self.metadata)
        self._spans = {
            n: (Span(len(header) + offsets[n], t.nbytes),) for n, t in self.tensors.items()
        }
        try:
            nbytes = len(header) + sum(t.nbytes for t in self.tensors.values())
            self._create(nbytes, resumed)
            put(self._fd, header, 0)
        except BaseException:
            self.close()
            raise


def _layout(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where in the data each tensor starts."""
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(tensors, key=lambda n: in_file(n, tensors[n])):
        info = tensors[name]
        offsets[name] = end
        end += info.nbytes
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets


def in_file(name: str, info: TensorInfo) -> tuple[int, str]:
    """By which tensors are sorted in a file."""
    return RANK[info.dtype], name


def check_tensors(tensors: Mapping[str, TensorInfo]) -> None:
    """Raise UsageError for a name or a dtype that no safetensors file can hold."""
    lacking = [n for n, info in tensors.items() if info.dtype not in RANK]
    if lacking:
        kinds = ", ".join(sorted({dtypes.NAME[tensors[n].dtype] for n in lacking}))
        raise UsageError(
            f"safetensors has no {kinds}: {', '.join(lacking)}",
            "write another container: orbax, msgpack or pt",
        )
    for name in tensors:
        if name == "__metadata__":
            raise UsageError(
                "a tensor is named __metadata__, which safetensors keeps for itself",
                "rename the tensor",
            )
        if not _is_unicode(name):
            raise UsageError(f"the tensor name {name!r} is not valid Unicode", "rename the tensor")


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """The JSON object `raw`; CorruptInput, naming `what`, for anything else.

    Stricter than `json.loads`: UTF-8 only, no name twice in one object, no lone surrogates.
    """
    try:
        # UTF-8 has no lone surrogates; an escape may be one.
        value = json.loads(raw.decode(), object_pairs_hook=_object if b"\\u" in raw else _unique)
    except (ValueError, RecursionError) as e:
        raise CorruptInput(f"{what} cannot be read: {e}", _AGAIN) from None
    if not isinstance(value, dict):
        raise CorruptInput(f"{what} is not a JSON object", _AGAIN)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for text in (text for pair in pairs for text in pair):
        if isinstance(text, str) and not _is_unicode(text):
            raise ValueError(f"{text!r} is not valid Unicode")
    return _unique(pairs)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"the name {twice!r} stands twice")
    return result


def _is_unicode(text: str) -> bool:
    """False where `text` holds a lone surrogate, which JSON's escapes can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _possible(shape: list[Any], itemsize: int) -> bool:
    """Whether NumPy can make an array of this shape, zeros in it or not."""
    return (
        len(shape) <= 64
        and all(type(n) is int and n >= 0 for n in shape)
        and math.prod(max(n, 1) for n in shape) * itemsize < 2**63
    )
