"""What one call of a module or function does, as statements."""

from __future__ import annotations

import keyword
from collections.abc import Iterator
from typing import Any

from convert.porting.rendering.call_items import GETITEM, is_getitem, made
from convert.porting.rendering.context import Context
from convert.porting.rendering.draft import Draft
from convert.porting.rendering.operands import Listed, Operand, SizeText
from convert.porting.rendering.scopes import Scope
from convert.porting.rendering.second_names import SecondNames
from convert.porting.rendering.size_names import SizeNames
from convert.porting.rendering.source_lines import mentioned, source_file
from convert.porting.rendering.statements import Body, Line
from convert.program.graph import ArrayType, GraphNode, ValueRef

_VIEWS = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")


def body_of(scope: Scope, context: Context) -> Body:
    """The body of one call."""
    return _Writing(Draft(scope, context)).body()


class _Writing:
    def __init__(self, draft: Draft) -> None:
        self.draft, self.scope, self.context = draft, draft.scope, draft.context
        self.tree, self.frames, self.items = draft.tree, draft.frames, draft.items
        self.sizes, self.second = SizeNames(draft), SecondNames(draft)

    def body(self) -> Body:
        """See `body_of`."""
        self._bind_arguments()
        for i, item in enumerate(self.items.items):
            if i not in self.items.inlined:
                self._statement(i, item)
        self.second.rest()
        made, reason = self.draft.body, self._reason(len(self.items))
        made.lines.append(Line([], self._returned(), comment=reason))
        self.sizes.keep_used()
        made.source = len({key[-1] for key, _ in self.items.keys})
        return made

    def _bind_arguments(self) -> None:
        draft, signatures = self.draft, self.context.signatures
        for value, text in signatures.argument_texts(self.scope).items():
            draft.texts[value] = text
            if text in draft.body.parameters:
                draft.bind(text, value)
            else:
                draft.names.hold(text.partition("[")[0], draft.end)
        given = signatures.given_to(self.scope)
        for name in draft.body.parameters:
            if name not in given:  # a condition may ask for it
                draft.names.hold(name, draft.end)

    # Statements.

    def _statement(self, i: int, item: GraphNode | Scope) -> None:
        draft = self.draft
        if is_getitem(item) and item.made in draft.texts:  # its list's own statement has named it
            return
        self.sizes.before(item)
        self.second.before(i, item)
        draft.read, self.second.casts = self.frames.mentioned(item), self.frames.casts(item)
        text = self._text(i)
        self.second.casts = {}
        shape = self.items.targets(item)
        values = list(_flat(shape))
        wanted = self.frames.targets(item, i, self.items.siblings(i), len(values))
        if self.items.is_argument(i):  # what the statement names is made of it
            wanted = self._taken_name(item)
        names = []
        for k, value in enumerate(values):
            if value < 0 or (self.items.last.get(value, -1) < 0 and len(values) > 1):
                names.append("_")
                continue
            hint = self._hint(item, wanted, values, k)
            name = draft.names.free(hint if hint.strip("_") else self._fallback(item), i)
            draft.bind(name, value)
            self.sizes.forget(name)
            draft.texts[value] = name
            names.append(name)
        targets = _grouped(shape, iter(names))
        line = Line(targets, text, self.frames.statement(item), comment=self._reason(i))
        draft.body.lines.append(line)

    def _hint(self, item: GraphNode | Scope, wanted: list[str], values: list[int], k: int) -> str:
        """The name that the source gives to one of the values that an item makes, if it does."""
        if len(wanted) == len(values):
            return wanted[k]
        if isinstance(item, Scope):
            part = item.part_of(values[k])
            if part is not None and part[1] == len(wanted):
                return wanted[part[0]]
            names = self.context.returns.get(id(item), [])
            if len(names) == len(values):
                return names[k]
        return wanted[0] if wanted else ""

    def _taken_name(self, item: GraphNode | Scope) -> list[str]:
        """The name of what an operation takes, where that is one tensor or array that has one."""
        taken = self.tree.taken(item)
        if isinstance(item, Scope) or len(taken) != 1:
            return []
        value = self.items.source(taken[0])
        held = self.tree.placeholders.get(value)
        if held is not None and held.kind in ("parameter", "buffer"):
            return [held.name.rpartition(".")[2]]
        if (maker := self.items.maker.get(value)) in self.items.inlined:
            return self._taken_name(self.items.items[maker])
        name = self.draft.texts.get(value, "")
        return [name] if name.isidentifier() else []

    def _fallback(self, item: GraphNode | Scope) -> str:
        """A name for a value whose statement gives none."""
        if isinstance(item, Scope):
            name = item.path.rpartition(".")[2] if item.function is None else "x"
            return name if not name.isdigit() else "x"
        name = item.op.split(".")[1].strip("_")
        if name == "detach":  # of what a function under no_grad returns
            name = self.draft.texts.get(self.items.source(item.args[0].value), name)
        return f"{name}_" if keyword.iskeyword(name) else name

    def _reason(self, i: int) -> str:
        """Why the statement of an item moves axes where the source does not."""
        parts = [self.items.items[k] for k, root in self.items.root.items() if root == i]
        told = [self.context.moved.reasons.get(v, "") for x in parts for v in made(x)]
        return "; ".join(dict.fromkeys(t for t in told if t))

    def _returned(self) -> str:
        draft, items = self.draft, self.items
        source = source_file(draft.file)
        draft.read = mentioned(source.last_return(draft.first_line, draft.last_line))
        last = items.maker.get(items.results[-1]) if items.results else None
        if last is not None and last in items.inlined:
            self.second.casts = self.frames.casts(items.items[last])
        texts = {v: self._value_text(v) for v in items.results}
        return self.context.returned(self.scope, lambda v: texts[items.source(v)])

    # Expressions.

    def _text(self, i: int) -> str:
        item = self.items.items[i]
        if isinstance(item, Scope):
            return self.context.call_text(
                self.scope,
                item,
                self._value_text,
                self.sizes.text,
                lambda x: self.sizes.number(x, item),
            )
        if item.op == GETITEM:
            text = self._value_text(item.args[0].value)
            return text if text.startswith("super()") else f"{text}[{item.args[1]}]"
        layers = self.context.layers
        if self.scope.path in layers.norms and layers.is_norm(self.scope, item):
            return f"super().__call__({self._value_text(item.args[0].value)})"
        numbers = self.tree.graph.numbers.get(item.op, frozenset())
        given = list(item.args)
        if item.op in _VIEWS:
            given[1] = self._as_parameters(_rest_open(item))
        args = [self._argument(x, item, k in numbers) for k, x in enumerate(given)]
        kwargs = {k: self._argument(x, item, k in numbers) for k, x in item.kwargs.items()}
        return self.context.operation(item.op, self.tree.type_of(item.made), args, kwargs)

    def _as_parameters(self, shape: Any) -> Any:
        """A shape of a function's, its first sizes as those of an argument: they may be others at
        another call."""
        arguments = [n for n in self.draft.body.parameters if n in self.draft.names.bound]
        for name in arguments if self.scope.function is not None else ():
            value = self.draft.names.bound[name]
            kind = self.tree.type_of(value)
            if not isinstance(kind, ArrayType) or self.tree.orders.get(value):
                continue
            sizes = [x if isinstance(x, int) else self.tree.type_of(x.value) for x in shape]
            same = [a == b for a, b in zip(sizes, kind.shape, strict=False)]
            count = same.index(False) if False in same else len(same)
            if count > 1:
                first = [SizeText(f"{name}.shape[{k}]", kind.shape[k]) for k in range(count)]
                return [*first, *shape[count:]]
        return shape

    def _value_text(self, value: int) -> str:
        value, draft = self.items.source(value), self.draft
        if value in draft.texts:
            names = [n for n in draft.names.names(value) if n in draft.read]
            newest = draft.names.newest(value, draft.texts[value])
            name = names[0] if len(names) == 1 else newest
            cast = self.second.casts.get(name, "")
            return f"{name}{cast}" if cast and self.second.is_cast(value, cast) else name
        if value in self.items.maker:
            return self._text(self.items.maker[value])
        return self.context.held.held_text(self.scope, value)

    def _argument(self, x: Any, node: GraphNode, is_number: bool) -> Any:
        if isinstance(x, ValueRef):
            if not self.tree.is_array(x.value):
                return self.sizes.number(self.tree.type_of(x.value), node)
            kind = self.tree.type_of(x.value)
            text = self._value_text(x.value)
            return Operand(text, kind) if isinstance(kind, ArrayType) else text
        if isinstance(x, list):
            parts = [self._argument(part, node, is_number) for part in x]
            name = self._list_name(x)
            return parts if name is None else Listed(name, parts)
        if is_number and ((type(x) is int and x > 1) or type(x) is float):
            return self.sizes.number(x, node)
        return x

    def _list_name(self, arrays: list[Any]) -> str | None:
        """The parameter that is a list of just these arrays."""
        for name in self.draft.body.parameters:
            given = self.scope.call.arguments.get(name)
            if isinstance(given, list) and given and self._sources(given) == self._sources(arrays):
                return name
        return None

    def _sources(self, arrays: list[Any]) -> list[Any]:
        return [self.items.source(x.value) if isinstance(x, ValueRef) else None for x in arrays]


def _flat(tree: Any) -> Iterator[int]:
    """The values in nested lists."""
    for part in tree:
        if isinstance(part, list):
            yield from _flat(part)
        else:
            yield part


def _grouped(shape: Any, names: Iterator[str]) -> list[str]:
    """Names as the targets of nested lists: `out`, `(h, c)`."""
    grouped = []
    for part in shape:
        inner = _grouped(part, names) if isinstance(part, list) else []
        closed = f"({', '.join(inner)}{',' * (len(inner) == 1)})"
        grouped.append(closed if isinstance(part, list) else next(names))
    return grouped


def _rest_open(item: GraphNode) -> Any:
    """The second argument of an operation; of one that flattens axes, which are one number then,
    that is left open as in the source."""
    shape, site = item.args[1], item.site
    flattens = item.op in _VIEWS and site is not None and "flatten" in site.text
    if not flattens or type(shape[-1]) is not int or shape[-1] < 2 or -1 in shape:
        return shape
    return [*shape[:-1], -1] if any(isinstance(n, ValueRef) for n in shape) else shape
