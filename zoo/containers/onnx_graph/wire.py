"""Protobuf's wire format, walked through a small window: what is not asked for is stepped over.

The protobuf library wants a message whole in memory, weights included. Here a field that has a
length is a pair of places in the file, and only names and numbers are read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from zoo.containers.base import pread
from zoo.containers.errors import CorruptInput

Span = tuple[int, int]  # first byte, and the one after the last
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5

MAX_FIELDS = 1_000_000  # of all messages that are looked into: a graph of 50,000 operations
_LENGTH = 5  # bytes of a length, as protobuf has it
_MAX_TEXT = 1 << 20  # bytes of one string
_WINDOW = 1 << 16
_AGAIN = "it is damaged or is not ONNX: copy or download it again, or export it again"


class Wire:
    """The fields of the messages in the file `fd`."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self.size = os.fstat(fd).st_size
        self._window = b""
        self._at = 0  # of the window's first byte
        self._fields = 0

    def fail(self, problem: str) -> NoReturn:
        raise CorruptInput(f"{self._path}: {problem}", _AGAIN)

    def whole(self) -> Span:
        """The span of the whole file."""
        return 0, self.size

    def fields(self, message: Span) -> Iterator[tuple[int, int, int, Span]]:
        """The fields of a message in order: number, wire type, value and span. A varint has a
        value, what has a length or a fixed width only a span."""
        at, end = message
        while at < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                self.fail(f"its graph has more than {MAX_FIELDS:,} fields")
            key, at = self._varint(at, end)
            number, kind = key >> 3, key & 7
            if not number:
                self.fail(f"a field at byte {at} has the number 0")
            if kind == VARINT:
                start = at
                value, at = self._varint(at, end)
                yield number, kind, value, (start, at)
                continue
            if kind == LENGTH:
                start = at
                length, at = self._varint(at, end)
                if at - start > _LENGTH:
                    self.fail(f"a length at byte {start} has {at - start} bytes")
            elif kind in (FIXED32, FIXED64):
                length = 4 if kind == FIXED32 else 8
            else:
                self.fail(f"a field at byte {at} is of wire type {kind}, which ONNX does not use")
            if length > end - at:
                self.fail(f"{length} bytes are due at byte {at}, and {end - at} are there")
            yield number, kind, 0, (at, at + length)
            at += length

    def text(self, span: Span) -> str:
        """A string."""
        if span[1] - span[0] > _MAX_TEXT:
            self.fail(f"a name has {span[1] - span[0]} bytes")
        try:
            return self._take(*span).decode()
        except UnicodeDecodeError as e:
            self.fail(f"a string is not UTF-8: {e}")

    def float32(self, span: Span) -> float:
        """A number of four bytes."""
        return float(struct.unpack("<f", self._take(*span))[0])

    def packed(self, span: Span, most: int) -> list[int]:
        """Varints one after another, as two's complement of 64 bits; no more than `most`."""
        at, found = span[0], []
        while at < span[1]:
            value, at = self._varint(at, span[1])
            found.append(signed(value))
            if len(found) > most:
                self.fail(f"more than {most} numbers where so many cannot be")
        return found

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        place = at - self._at
        if not 0 <= place <= len(self._window) - 10:
            self._move(at)
            place = 0
        value = shift = 0
        window = self._window
        for i in range(place, min(place + 10, len(window), place + end - at)):
            byte = window[i]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at + i - place + 1
            shift += 7
        self.fail(f"a number at byte {at} does not end")

    def _take(self, start: int, end: int) -> bytes:
        place = start - self._at
        if place < 0 or place + end - start > len(self._window):
            if end - start > _WINDOW:
                return pread(self._fd, end - start, start, str(self._path)).tobytes()
            self._move(start)
            place = 0
        return self._window[place : place + end - start]

    def _move(self, at: int) -> None:
        length = max(0, min(_WINDOW, self.size - at))
        self._window = pread(self._fd, length, at, str(self._path)).tobytes()
        self._at = at


def signed(value: int) -> int:
    """A varint as protobuf's int32 and int64 mean it."""
    return value - (1 << 64) if value >> 63 else value
