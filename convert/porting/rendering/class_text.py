"""A class of a port as lines of its file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from convert.porting.rendering.class_arguments import WrittenClass
from convert.porting.rendering.classes import Classes
from convert.porting.rendering.constructor import written as plainly
from convert.porting.rendering.context import Context
from convert.porting.rendering.declared_types import Types, type_of
from convert.porting.rendering.inits import BASE
from convert.porting.rendering.loops import Loop, lengths_of, rolled
from convert.porting.rendering.narrowing import Needed, needed
from convert.porting.rendering.statements import Body, Line, tidied
from convert.porting.rendering.variants import negation
from convert.porting.rendering.written_lines import INDENT, origin, plain, written_line

_TYPED = ("nnx.Linear(", "nnx.Conv(", "nnx.ConvTranspose(", "nnx.LayerNorm(", "nnx.GroupNorm(",
          "nnx.RMSNorm(", "nnx.BatchNorm(")  # fmt: skip


class ClassText:
    """Writes the classes of a file, parts before what holds them."""

    def __init__(self, context: Context, classes: Classes) -> None:
        self.context, self.classes = context, classes
        self.types = Types(context)
        # Of each class, its parameters in order, and which of them may be None.
        self.taken: dict[str, tuple[list[str], frozenset[str]]] = {}

    def lines(self, written: WrittenClass) -> Iterator[str]:
        """The whole class."""
        base = "nnx.List[Any]" if written.items else "nnx.Module"
        derived = written.whole().get(BASE)
        base = derived.callee if derived is not None else base
        yield f"class {written.name}({base}):"
        yield from origin(written.of)
        yield ""
        if written.body is None:
            yield f"{INDENT}# It only holds its parts: the traced call does not call it."
            yield ""
        made = dict(written.init()) if written.whole() else {}
        statements = [] if written.body is None else list(self._statements(written, written.body))
        lacking = needed(statements, self._taken(made))
        if made:
            yield from self._init(written, made, lacking)
            yield ""
        elif "" in written.made:  # the model itself, which whoever makes it gives keys
            yield f"{INDENT}def __init__(self, *, rngs: nnx.Rngs) -> None:"
            yield f"{INDENT * 2}del rngs  # nothing is drawn"
            yield ""
        if written.body is not None:
            yield self._signature(written, written.body, lacking)
            yield from (f"{INDENT * 2}{line}" for line in statements)

    def _taken(self, made: dict[str, str]) -> dict[str, tuple[list[str], frozenset[str]]]:
        """What the calls of parts take, where all that an attribute holds is of one class."""
        found = {}
        for name, text in made.items():
            held = set(re.findall(r"\b\w+(?=\()", text)) & self.taken.keys()
            if len(held) == 1:
                found[f"self.{name}"] = self.taken[held.pop()]
        return found

    def _init(self, written: WrittenClass, made: dict[str, str], lacking: Needed) -> Iterator[str]:
        given = written.arguments_of(next(iter(written.made)))
        defaults = written.defaults()
        kinds = {n: type_of(written.parameters[n].values()) for n in given}
        types = [
            f"{n}: {kinds[n]}" + (f" = {plainly(defaults[n])}" if n in defaults else "")
            for n in given
        ]
        types += ["*", *(f"{n}: Any" for n in written.given), "rngs: nnx.Rngs"]
        yield f"{INDENT}def __init__({', '.join(['self', *types])}) -> None:"
        if written.items:
            numbered = [text for name, text in made.items() if name.isdigit()]
            yield f"{INDENT * 2}super().__init__([{', '.join(numbered)}])"
        optional = {n for n, kind in kinds.items() if "None" in kind}
        for name, text in made.items():
            if name == BASE:
                arguments = text.partition("(")[2]
                yield f"{INDENT * 2}super().__init__({arguments}"
            elif name.isidentifier():
                declared = _declared(name, text, lacking, optional)
                yield f"{INDENT * 2}self.{name}{declared} = {plain(text)}"
            elif not name.isdigit():
                yield f"{INDENT * 2}setattr(self, {name!r}, {plain(text)})"

    def _signature(self, written: WrittenClass, body: Body, lacking: Needed) -> str:
        scopes = [s for p in written.made for s in self.classes.scopes.get(p, ())]
        kinds = {n: self.types.parameter(n, scopes) for n in body.parameters}
        optional = {n for n in kinds if self.context.signatures.is_optional(n, scopes[0])}
        for name in optional:
            hidden = kinds[name] == "Any" or name in lacking.names
            kinds[name] = "Any = None" if hidden else f"{kinds[name]} | None = None"
        self.taken[written.name] = body.parameters, frozenset(optional)
        parameters = [f"{name}: {kind}" for name, kind in kinds.items()]
        derived = "  # type: ignore[override]" if BASE in written.whole() else ""
        result = self.types.result(scopes)
        return f"{INDENT}def __call__({', '.join(['self', *parameters])}) -> {result}:{derived}"

    def _statements(self, written: WrittenClass, body: Body) -> Iterator[str]:
        """The statements of the call, in lines without the margin."""
        lengths = lengths_of(self.context.tree.modules, next(iter(written.made)))
        guard = ""
        for line in rolled(tidied(body.lines), lengths):
            own = line.guard if isinstance(line, Line) else ""
            if own != guard and own:
                after = guard and own == negation(guard)
                yield f"{'else' if after else f'if {own}'}:"
            guard = own
            margin = INDENT if own else ""
            if isinstance(line, Loop):
                yield f"{margin}{line.header()}"
                for one in line.lines:
                    yield from written_line(one, margin + INDENT)
            else:
                yield from written_line(line, margin)


def _declared(name: str, text: str, lacking: Needed, optional: set[str]) -> str:
    """The annotation of an attribute: where it is needed under no condition that says that it is
    there, or its items are of several types."""
    me = f"self.{name}"
    may_lack = text in optional or text.endswith(" else None")
    if (may_lack and me in lacking.names) or (me in lacking.layers and text.startswith(_TYPED)):
        return ": Any"
    mixed = text.startswith("nnx.List(") and len(_makers(ast.parse(text, mode="eval").body)) > 1
    return ": nnx.List[Any]" if mixed or me in lacking.lists else ""


def _makers(node: ast.AST) -> set[str]:
    """What makes the items of a list, in its source; of nested lists those of all of them."""
    if isinstance(node, ast.List):
        return {maker for part in node.elts for maker in _makers(part)}
    if isinstance(node, ast.Starred):
        return _makers(node.value)
    if isinstance(node, ast.GeneratorExp | ast.ListComp):
        return _makers(node.elt)
    if not isinstance(node, ast.Call):
        return {ast.unparse(node)}
    callee = ast.unparse(node.func)
    return _makers(node.args[0]) if callee == "nnx.List" else {callee}
