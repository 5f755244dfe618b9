"""What a type checker cannot see is there: optional attributes and parameters that a statement
needs, under no condition that says so by name."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# What takes None too: the call of a part by an attribute, and where or how the argument is given.
Taken = Mapping[str, tuple[Sequence[str], frozenset[str]]]

_ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)
_LEAVES = ("bias", "scale")  # of Flax's layers, which may have been made without


@dataclass
class Needed:
    """Names (`mask`, `self.norm`) that are needed where nothing says that they are there; the
    layers of whose tensors that is so; and the lists over which a variable goes that has gone over
    another one, whose items are others."""

    names: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)
    lists: set[str] = field(default_factory=set)


def needed(statements: Sequence[str], taken: Taken) -> Needed:
    """What these lines of a call need. `taken`: of parts whose class is known, by `self.part`,
    their parameters in order, and which of those may be None."""
    body = "\n".join(f"    {line}" for line in statements)
    (function,) = ast.parse(f"def call():\n    pass\n{body}").body
    assert isinstance(function, ast.FunctionDef)
    walk = _Walk(taken)
    walk.block(function.body, frozenset())
    return walk.found


class _Walk:
    def __init__(self, taken: Taken) -> None:
        self.taken, self.found = taken, Needed()
        self.of: dict[str, str] = {}  # a loop's variable -> the list

    def block(self, body: Sequence[ast.stmt], there: frozenset[str]) -> frozenset[str]:
        """Look through statements; `there` are names that are known to be. Those that are after
        it."""
        for one in body:
            if isinstance(one, ast.If):
                there = self._choice(one, there)
            elif isinstance(one, ast.For):
                there = self._loop(one, there)
            elif isinstance(one, ast.Assign):
                self._expression(one.value, there)
                there |= {n.id for t in one.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            else:
                for part in ast.iter_child_nodes(one):
                    if isinstance(part, ast.expr):
                        self._expression(part, there)
        return there

    def _choice(self, one: ast.If, there: frozenset[str]) -> frozenset[str]:
        self._expression(one.test, there)
        yes, no = _said(one.test)
        after = self.block(one.body, there | yes), self.block(one.orelse, there | no)
        if one.body and isinstance(one.body[-1], _ENDS):
            return after[1]
        if one.orelse and isinstance(one.orelse[-1], _ENDS):
            return after[0]
        return after[0] & after[1]

    def _loop(self, one: ast.For, there: frozenset[str]) -> frozenset[str]:
        zipped = isinstance(one.iter, ast.Call)
        lists = one.iter.args if isinstance(one.iter, ast.Call) else [one.iter]
        targets = one.target.elts if zipped and isinstance(one.target, ast.Tuple) else [one.target]
        own = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        for target, part in zip(targets, lists, strict=False):
            held = part.value if isinstance(part, ast.Subscript) else part
            name, variable = _name(held), _name(target)
            if name and variable and self.of.setdefault(variable, name) != name:
                self.found.lists.add(name)
        for part in lists:
            self._expression(part, there)
        return self.block(one.body, there | own) & (there | own)

    def _expression(self, node: ast.expr, there: frozenset[str]) -> None:
        if (name := _name(node)) is not None:
            if name not in there:
                self.found.names.add(name)
            return
        if isinstance(node, ast.IfExp):
            yes, no = _said(node.test)
            self._expression(node.test, there)
            self._expression(node.body, there | yes)
            self._expression(node.orelse, there | no)
            return
        if isinstance(node, ast.BoolOp):
            for part in node.values:
                self._expression(part, there)
                there |= _said(part)[0 if isinstance(node.op, ast.And) else 1]
            return
        if isinstance(node, ast.Compare) and _is_none(node):
            return
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
            layer = _name(node.value.value)
            if layer is not None and node.value.attr in _LEAVES:
                self.found.layers.add(layer)
        allowed = self._allowed(node) if isinstance(node, ast.Call) else ()
        for part in _parts(node):
            if part not in allowed or _name(part) is None:
                self._expression(part, there)

    def _allowed(self, call: ast.Call) -> list[ast.expr]:
        """The arguments of a call of a part that may be None, as far as its class is known."""
        name = _name(call.func.value) if isinstance(call.func, ast.Subscript) else _name(call.func)
        name = self.of.get(name or "", name)
        if name is None or name not in self.taken:
            return []
        order, optional = self.taken[name]
        given = dict(zip(order, call.args, strict=False))
        given |= {k.arg: k.value for k in call.keywords if k.arg is not None}
        return [x for n, x in given.items() if n in optional]


def _parts(node: ast.AST) -> list[ast.expr]:
    """The expressions right below a node, those of keywords and slices too."""
    found: list[ast.expr] = []
    for part in ast.iter_child_nodes(node):
        found += [part] if isinstance(part, ast.expr) else _parts(part)
    return found


def _name(node: ast.AST) -> str | None:
    """`x` or `self.x`; None of anything else."""
    if isinstance(node, ast.Name):
        return None if node.id == "self" else node.id
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return f"self.{node.attr}" if own and node.value.id == "self" else None  # type: ignore[attr-defined]


def _is_none(node: ast.Compare) -> bool:
    (operator,) = node.ops if len(node.ops) == 1 else (None,)
    last = node.comparators[-1]
    named = _name(node.left) is not None and isinstance(last, ast.Constant) and last.value is None
    return named and isinstance(operator, ast.Is | ast.IsNot)


def _said(test: ast.expr) -> tuple[frozenset[str], frozenset[str]]:
    """The names that are there where a condition holds, and where it does not."""
    none: frozenset[str] = frozenset()
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yes, no = _said(test.operand)
        return no, yes
    if isinstance(test, ast.BoolOp):
        every = [_said(part) for part in test.values]
        if isinstance(test.op, ast.And):
            return none.union(*(yes for yes, _ in every)), none
        return none, none.union(*(no for _, no in every))
    if isinstance(test, ast.Compare) and _is_none(test):
        there = frozenset({_name(test.left) or ""})
        return (none, there) if isinstance(test.ops[0], ast.Is) else (there, none)
    name = _name(test)
    return (frozenset({name}) if name else none), none
