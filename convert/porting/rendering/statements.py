"""A statement of a port, and the statements of a call."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from convert.program.graph import CodeLine


@dataclass
class Line:
    """One statement: `targets = text`, or `return text` where there are none. `guard` is the
    condition that it is under: not every instance of the class has it. `comment` stands above
    it."""

    targets: list[str]
    text: str
    site: CodeLine | None = None
    guard: str = ""
    comment: str = ""

    @property
    def is_bare(self) -> bool:
        """Whether it only returns what has a name."""
        return not self.targets and self.text.isidentifier()

    def __str__(self) -> str:
        return f"{', '.join(self.targets)} = {self.text}" if self.targets else f"return {self.text}"


@dataclass
class Body:
    """The statements of a call, its parameters, and the numbers that they take from `self`.
    `source` is how many statements of the source the operations are of."""

    parameters: list[str]
    lines: list[Line] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    source: int = 0

    def returned(self) -> list[str]:
        """The names of what it returns; none where that is no names."""
        names = self.lines[-1].text.split(", ")
        return names if all(map(str.isidentifier, names)) else []


def tidied(lines: Sequence[Line]) -> list[Line]:
    """The statements without those that do nothing."""
    return _renamed(_without_no_ops(_without_swaps(_without_dead(lines))))


def _without_dead(lines: Sequence[Line]) -> list[Line]:
    """The statements without those whose names nothing mentions before they are given anew, unless
    they call a part, which may draw numbers or move statistics."""
    kept: list[Line] = []
    for line in reversed(lines):
        read = any(_is_read(name, kept) for name in line.targets)
        if not line.targets or line.guard or read:
            kept.insert(0, line)
        elif _CALLED.search(line.text):
            kept.insert(0, replace(line, targets=["_"]))
    return kept


def _without_no_ops(lines: Sequence[Line]) -> list[Line]:
    """The statements without those whose operation turned out to be none, `b = a` of a line that
    the source computes something in: there `a` is read for `b`, where it can be."""
    kept = list(lines)
    at = 0
    while at < len(kept):
        other, after = kept[at].text, kept[at + 1 :]
        name = kept[at].targets[0] if kept[at].targets else ""
        ends = [i for i, x in enumerate(after) if name in x.targets]
        last = ends[0] + 1 if ends else len(after)
        if not _is_no_op(kept[at]) or any(
            x.guard if name in x.targets else other in x.targets for x in after[:last]
        ):
            at += 1
            continue
        read = re.compile(rf"(?<![\w.'\"]){name}\b(?!\s*=[^=])")  # no keyword of a call
        kept[at : at + 1 + last] = [replace(x, text=read.sub(other, x.text)) for x in after[:last]]
    return kept


def _renamed(lines: Sequence[Line]) -> list[Line]:
    """The statements with the name that a value has in the end: `b = f(x)` for `a = f(x); b = a`
    where nothing else reads `a`."""
    kept = list(lines)
    for at in range(len(kept) - 1, 0, -1):
        before, copy = kept[at - 1], kept[at]
        plain = copy.site is None and not copy.guard and not before.guard and not copy.comment
        if not plain or len(copy.targets) != 1 or before.targets != [copy.text]:
            continue
        if not _is_read(copy.text, kept[at + 1 :]):
            kept[at - 1 : at + 1] = [replace(before, targets=copy.targets)]
    return kept


def _without_swaps(lines: Sequence[Line]) -> list[Line]:
    """The statements without axes that are swapped where a name is given, and swapped back wherever
    that is read."""
    kept = list(lines)
    for at, line in enumerate(kept):
        swapped = _swapped(line.text)
        if swapped is None or len(line.targets) != 1 or line.guard:
            continue
        inner, (a, b) = swapped
        back = re.compile(rf"(?<![\w.'\"]){line.targets[0]}\.swapaxes\(({a}, {b}|{b}, {a})\)")
        after = list(_until_given_anew(line.targets[0], kept[at + 1 :]))
        rest = [back.sub("", x.text) for x in after]
        if any(x.guard for x in after):
            continue
        if all(line.targets[0] not in words(text) for text in rest):
            kept[at] = replace(line, text=inner)
            for i, x in enumerate(after, at + 1):
                kept[i] = replace(x, text=back.sub(line.targets[0], x.text))
    return kept


def _until_given_anew(name: str, after: Sequence[Line]) -> Iterator[Line]:
    for line in after:
        yield line
        if name in line.targets:
            return


def _swapped(text: str) -> tuple[str, tuple[str, str]] | None:
    """An expression whose last step is to swap two axes: what it swaps them of, and which."""
    if not text.endswith(")") or ".swapaxes(" not in text:
        return None
    node = ast.parse(text, mode="eval").body
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    if node.func.attr != "swapaxes" or len(node.args) != 2:
        return None
    a, b = map(ast.unparse, node.args)
    return ast.unparse(node.func.value), (a, b)


def _is_no_op(line: Line) -> bool:
    plain = line.site is not None and not line.guard and not line.comment
    return plain and len(line.targets) == 1 and line.text.isidentifier()


_CALLED = re.compile(r"\bself(\.\w+|\[[^]]*\])*\(|\bself\b(?!\.)")  # of a part, or by a function


def _is_read(name: str, after: Sequence[Line]) -> bool:
    for line in after:
        if name in words(line.text):
            return True
        if name in line.targets and not line.guard:
            return False
    return False


def words(text: str) -> Iterator[str]:
    """The names in a text."""
    yield from re.findall(r"[A-Za-z_]\w*", text)
