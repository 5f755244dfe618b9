"""Instances and calls of one class that do not all do the same: statements under conditions."""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from convert.porting.rendering.source_lines import own_name, source_file
from convert.porting.rendering.statements import Line, words

_PLAIN = (ast.Attribute, ast.Name, ast.Load, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp,
          ast.Not, ast.And, ast.Or, ast.Is, ast.IsNot, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt,
          ast.GtE)  # fmt: skip

ABSENT = object()  # the number of a part that an instance has not


@dataclass(frozen=True)
class Instance:
    """One call of an instance: torch's module, the attributes that `__init__` sets, the statements,
    the parameters that the call gives arrays for, and those that are words or numbers."""

    module: Any
    attributes: frozenset[str]
    lines: tuple[str, ...]
    given: frozenset[str] = frozenset()
    stated: tuple[tuple[str, Any], ...] = ()


@dataclass
class Condition:
    """A condition on `self`, by its text, and whether it holds for an instance. `values` are the
    plain attributes that it mentions; `far` is one that has nothing to do with the statements, and
    tells the calls apart all the same."""

    text: str
    holds: Callable[[Instance], bool]
    values: tuple[str, ...] = ()
    far: bool = False

    def negated(self) -> Condition:
        """The opposite."""
        opposite = negation(self.text)
        return Condition(opposite, lambda one: not self.holds(one), self.values, self.far)


def negation(text: str) -> str:
    """The opposite of a condition."""
    if text.startswith("not ") and " and " not in text and " or " not in text:
        return text.removeprefix("not ")
    pairs = (" is not None", " is None"), (" is None", " is not None")
    if found := re.fullmatch(r"(\w+) (==|!=) ('\w*'|[\d.]+|True|False)", text):
        return f"{found[1]} {'!=' if found[2] == '==' else '=='} {found[3]}"
    for a, b in pairs:
        if text.endswith(a) and text.count(" ") == a.count(" "):
            return text.removesuffix(a) + b
    return f"not {text}" if re.fullmatch(r"[\w.]+", text) else f"not ({text})"


class Union:
    """The statements of a class, and the conditions that they are under, by their texts."""

    def __init__(self, lines: Sequence[Line], first: Instance) -> None:
        self.lines = list(lines)
        self.conditions: dict[str, Condition] = {}
        self.instances = [first]

    def joined(self, lines: Sequence[Line], one: Instance) -> Union | None:
        """With an instance of other statements; None where no condition tells them apart."""
        old = [str(x) for x in self.lines]
        new = [str(x) for x in lines]
        made = Union([], one)
        made.conditions = dict(self.conditions)
        made.instances = [*self.instances, one]
        for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            if kind == "equal":
                made.lines += self.lines[a:b]
                continue
            if not made._add(self.lines[a:b], lines[c:d], one):
                return None
        return made if made._holds() else None

    def renamed(self, condition: Condition, text: str) -> None:
        """Write a condition in other words."""
        del self.conditions[condition.text]
        other = dataclasses.replace(condition, text=text, values=())
        self.conditions[text] = other
        for line in self.lines:
            if line.guard == condition.text:
                line.guard = text

    def _add(self, old: Sequence[Line], new: Sequence[Line], one: Instance) -> bool:
        before = self.instances[:-1]
        if any(line.guard for line in old):
            # Under conditions already: they must be false here, and nothing else must be done.
            if any(not x.guard or self.conditions[x.guard].holds(one) for x in old):
                return False
            if new:
                return False
            self.lines += old
            return True
        found = [*itertools.islice(_conditions(old, before, [one]), 1)]
        if not found or found[0].far:
            found += [c.negated() for c in itertools.islice(_conditions(new, [one], before), 1)]
        if not found:
            return False
        yes = min(found, key=lambda c: c.far)
        no = yes.negated()
        self.conditions |= {yes.text: yes, no.text: no}
        self.lines += [dataclasses.replace(x, guard=yes.text) for x in old]
        self.lines += [dataclasses.replace(x, guard=no.text) for x in new]
        return True

    def _holds(self) -> bool:
        """Whether every instance does what it did."""
        for one in self.instances:
            own = [str(x) for x in self.lines if not x.guard or self.conditions[x.guard].holds(one)]
            if tuple(own) != one.lines:
                return False
        return True


def _conditions(
    lines: Sequence[Line], having: Sequence[Instance], lacking: Sequence[Instance]
) -> Iterator[Condition]:
    """What tells instances that have these statements from those that have not."""
    candidates = [
        *_of_source(lines, having[0].module), *_of_parts(lines, having),
        *_of_arguments(lines, having),
    ]  # fmt: skip
    for found in candidates:
        try:
            right = all(map(found.holds, having)) and not any(map(found.holds, lacking))
        except Exception:  # whatever a stranger's attribute raises
            continue
        if right:
            yield found


def _of_source(lines: Sequence[Line], module: Any) -> Iterator[Condition]:
    """The conditions of the source that the first statement is under."""
    site = next((x.site for x in lines if x.site is not None), None)
    if site is None:
        return
    me = own_name(module)
    for test, holds in source_file(site.file).choices_around(site.line):
        parts = list(ast.walk(test))
        if not all(isinstance(p, _PLAIN) for p in parts):
            continue
        if any(isinstance(p, ast.Name) and p.id != me for p in parts):
            continue
        code = compile(ast.Expression(test), "<condition>", "eval")

        def value(one: Instance, code: Any = code) -> bool:
            return bool(eval(code, {"__builtins__": {}}, {me: one.module}))

        text = re.sub(rf"\b{me}\.(?:\w+\.)*(\w+)", r"self.\1", ast.unparse(test))
        tested = tuple(dict.fromkeys(re.findall(r"self\.(\w+)", text)))
        found = Condition(text, value, tested)
        yield found if holds else found.negated()


def _of_parts(lines: Sequence[Line], having: Sequence[Instance]) -> Iterator[Condition]:
    """Whether a part is there that the statements mention."""
    names = dict.fromkeys(n for x in lines for n in re.findall(r"self\.(\w+)", x.text))
    for name in names:
        if all(name in one.attributes for one in having):
            yield Condition(f"self.{name} is not None", functools.partial(_has, name))


def _has(name: str, one: Instance) -> bool:
    return name in one.attributes


def _of_arguments(lines: Sequence[Line], having: Sequence[Instance]) -> Iterator[Condition]:
    """Whether an argument is given, those first that the statements mention."""
    here = {w for line in lines for w in words(line.text)}
    given = frozenset.intersection(*(one.given for one in having))
    for name in sorted(given, key=lambda n: (n not in here, n)):
        test = functools.partial(_is_given, name)
        yield Condition(f"{name} is not None", test, far=name not in here)
    for name, value in having[0].stated:
        test = functools.partial(_is_stated, name, value)
        yield Condition(f"{name} == {value!r}", test, far=not lines)


def _is_stated(name: str, value: Any, one: Instance) -> bool:
    return (name, value) in one.stated


def _is_given(name: str, one: Instance) -> bool:
    return name in one.given
