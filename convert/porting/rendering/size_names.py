"""The sizes in a body: by the names, attributes and shapes that the source has them from."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from convert.porting.rendering.draft import Draft
from convert.porting.rendering.operands import SizeText
from convert.porting.rendering.scopes import Scope
from convert.porting.rendering.sizes import (
    Reckoned,
    Unpacked,
    composed,
    plainly_written,
    same_size,
    unpackings,
)
from convert.porting.rendering.statements import Line, words
from convert.program.graph import ArrayType, GraphNode


class SizeNames:
    """See the module's first lines."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        span = draft.first_line, draft.last_line
        self._unpackings = unpackings(draft.file, *span) if draft.file else []
        self._samples = draft.tree.graph.samples()
        self._local: dict[str, int | str] = dict(draft.numbers())
        self._unpacked: dict[str, tuple[Line, int]] = {}
        self._asked: Counter[tuple[int, str]] = Counter()  # how often an item asked for a size

    def number(self, wanted: Any, item: GraphNode | Scope) -> Any:
        """A number as the statement of the source has it, if it does."""
        if isinstance(wanted, bool) or wanted is None:
            return wanted
        known = self.draft.body.attributes
        found = [
            (text, attributes)
            for text, attributes in self.draft.frames.sizes(item, self._local, self._shapes())
            if same_size(text.value, wanted, self._samples)
            and not any(known.get(name, value) != value for name, value in attributes.items())
        ]
        if found:  # of sizes that are equal by chance, the first time the first
            key = id(item), str(wanted)
            self._asked[key] += 1
            text, attributes = found[min(self._asked[key], len(found)) - 1]
            known |= attributes
            self._ask_for(text.text)
            return text
        return wanted if isinstance(wanted, int | float) else SizeText(self.text(wanted), wanted)

    def _shapes(self) -> dict[str, tuple[int | str, ...]]:
        """The shapes of the arrays that have a name now, but for those that lie otherwise."""
        draft = self.draft
        bound = {n: v for n, v in draft.names.bound.items() if not draft.tree.orders.get(v)}
        kinds = {n: draft.tree.type_of(v) for n, v in bound.items()}
        return {n: k.shape for n, k in kinds.items() if isinstance(k, ArrayType)}

    def text(self, wanted: str) -> str:
        """An expression of the inputs' sizes, of what has a name here."""
        found = self._axis(wanted)
        if found is None and not self.draft.scope.is_model and not self._is_partly_known(wanted):
            return self.draft.context.signatures.size(self.draft.scope, wanted)
        return found or composed(wanted, self._symbol, self._part)

    def _is_partly_known(self, wanted: str) -> bool:
        """Whether an array has one of the sizes that an expression is made of; where none has, it
        is given as a whole, as the caller may know it."""
        known: list[str | None] = []

        def symbol(name: str) -> str:
            known.append(self._axis(name))
            return name

        def part(expression: str) -> str | None:
            known.append(self._part(expression))
            return known[-1]

        composed(wanted, symbol, part)
        return any(text is not None for text in known)

    def _part(self, wanted: str) -> str | None:
        """A size that an expression is made of, where an array has it: by what it reads as, as it
        stands there in no brackets."""
        kinds = map(self.draft.tree.type_of, self.draft.names.bound.values())
        shapes = (k.shape for k in kinds if isinstance(k, ArrayType))
        every = [*self._local.values(), *(n for shape in shapes for n in shape)]
        held = (n for n in every if isinstance(n, str) and plainly_written(n) == wanted)
        return next((text for n in held if (text := self._axis(n)) is not None), None)

    def forget(self, name: str) -> None:
        """The name is an array's from now on."""
        self._local.pop(name, None)

    def before(self, item: GraphNode | Scope) -> None:
        """Name the sizes that the source names before the statement of an item."""
        line = self.draft.frames.line(item)
        while line and self._unpackings and self._unpackings[0].line <= line:
            found = self._unpackings.pop(0)
            if isinstance(found, Reckoned):
                self._reckon(found)
                continue
            value = self.draft.names.bound.get(found.array)
            kind = self.draft.tree.type_of(value) if value is not None else None
            if not isinstance(kind, ArrayType):
                continue
            order = self.draft.tree.orders.get(value, ()) if value is not None else ()
            self._unpack(_as_it_lies(found, order), kind.shape)

    def _reckon(self, found: Reckoned) -> None:
        """Name what the source reckons of sizes."""
        draft = self.draft
        shapes = {}
        for name, value in draft.names.bound.items():
            kind = draft.tree.type_of(value)
            if isinstance(kind, ArrayType):
                axes = draft.tree.orders.get(value) or tuple(range(len(kind.shape)))
                shapes[name] = kind.shape, axes
        text = found.text(self._local, shapes)
        if text is None or not draft.names.is_free(found.name, len(draft.items)):
            return
        line = Line([found.name], text.text)
        draft.body.lines.append(line)
        self._hold(found.name, text.value, line, 0)

    def keep_used(self) -> None:
        """Leave out the names of sizes that nothing mentions."""
        lines = self.draft.body.lines
        mentioned = Counter(w for line in lines for w in words(line.text))
        for name, (line, k) in self._unpacked.items():
            if not mentioned[name]:
                line.targets[k] = "_"
        self.draft.body.lines = [x for x in lines if not x.targets or set(x.targets) != {"_"}]
        for name, (line, _) in self._unpacked.items():
            if mentioned[name]:
                self._ask_for(line.text)

    def _ask_for(self, text: str) -> None:
        """Have the numbers that a function's text mentions among its parameters."""
        given = dict(self.draft.numbers())
        for name in words(text) if given else ():
            if name in given:
                self.draft.context.signatures.number(self.draft.scope, name)

    def _symbol(self, symbol: str) -> str:
        if (found := self._axis(symbol)) is not None:
            return found
        if not self.draft.scope.is_model:
            return self.draft.context.signatures.size(self.draft.scope, symbol)
        return self._of_input(symbol)

    def _of_input(self, symbol: str) -> str:
        """A name for an axis of an input of the model, which no array that has a name has now."""
        draft, tree = self.draft, self.draft.tree
        path, axis = tree.graph.symbols[symbol]
        value = next(p.value for p in tree.graph.of_kind("input") if p.name == path)
        order = tree.orders.get(value)
        text = draft.context.signatures.argument_texts(draft.scope)[value]
        name = draft.names.free("size", len(draft.items))
        line = Line([name], f"{text}.shape[{axis if order is None else order.index(axis)}]")
        draft.body.lines.insert(0, line)
        self._hold(name, symbol, line, 0)
        return name

    def _axis(self, wanted: str) -> str | None:
        """`x.shape[1]`, of an array that has a name now."""
        for name, size in self._local.items():
            if size == wanted:
                return name
        draft = self.draft
        # The array that the statement mentions, rather than another of that size.
        for name, value in sorted(draft.names.bound.items(), key=lambda n: n[0] not in draft.read):
            kind = draft.tree.type_of(value)
            shape = kind.shape if isinstance(kind, ArrayType) else ()
            if wanted in shape:
                return f"{name}.shape[{shape.index(wanted)}]"
        for value, text in draft.texts.items():
            kind = draft.tree.type_of(value)
            if "[" in text and isinstance(kind, ArrayType) and wanted in kind.shape:
                return f"{text}.shape[{kind.shape.index(wanted)}]"
        return None

    def _unpack(self, found: Unpacked, shape: tuple[int | str, ...]) -> None:
        text = f"{found.array}.shape"
        if found.axis is not None:
            if not -len(shape) <= found.axis < len(shape):
                return
            pairs = [(found.names[0], shape[found.axis])]
            text += f"[{found.axis}]"
        elif len(shape) != len(found.names):
            return
        else:
            pairs = list(zip(found.names, shape, strict=True))
        if any(n and not self.draft.names.is_free(n, len(self.draft.items)) for n, _ in pairs):
            return
        line = Line([n or "_" for n, _ in pairs], text)
        self.draft.body.lines.append(line)
        for k, (name, size) in enumerate(pairs):
            if name:
                self._hold(name, size, line, k)

    def _hold(self, name: str, size: Any, line: Line, k: int) -> None:
        self._local[name] = size
        self.draft.names.hold(name, self.draft.end)
        self._unpacked[name] = (line, k)


def _as_it_lies(found: Unpacked, order: tuple[int, ...]) -> Unpacked:
    """The names of the sizes of an array whose axes are in another order than torch's."""
    if not order:
        return found
    if found.axis is not None:
        wanted = found.axis % len(order) if -len(order) <= found.axis < len(order) else None
        return found if wanted is None else replace(found, axis=order.index(wanted))
    if len(found.names) != len(order):
        return found
    return replace(found, names=tuple(found.names[a] for a in order))
