"""What one call of a module does, as statements: its `__call__`."""

from __future__ import annotations

import keyword
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeGuard

from convert.porting.rendering.context import Context
from convert.porting.rendering.names import Frames, Key, Names
from convert.porting.rendering.operands import Operand, SizeText
from convert.porting.rendering.scopes import Scope
from convert.porting.rendering.sizes import Unpacked, composed, same_size, unpackings
from convert.porting.rendering.source_lines import copies, mentioned, source_file
from convert.porting.rendering.statements import Body, Line, words
from convert.porting.rules.elementwise import COPIES
from convert.program.graph import ArrayType, GraphNode, ValueRef

_GETITEM = "operator.getitem"
_CASTS = {"aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device"}


def body_of(scope: Scope, context: Context) -> Body:
    """The body of one call."""
    return _Writing(scope, context).body()


class _Writing:
    def __init__(self, scope: Scope, context: Context) -> None:
        self.scope, self.context = scope, context
        self.tree = context.tree
        self.frames = Frames(scope)
        self.made = Body(context.signatures.parameters_of(scope))
        self.items = list(context.layers.spliced(scope))
        self.copies = {_made(i)[0]: self._first_taken(i) for i in self.items if self._is_copy(i)}
        self.items = [i for i in self.items if _made(i) and not self._is_copy(i)]
        self.maker = {v: i for i, item in enumerate(self.items) for v in _made(item)}
        self.results = [
            self.source(v) for v in context.signatures.results_of(scope) if v is not None
        ]
        self.names = Names(self.made.parameters, context.rules.names | context.taken)
        self.texts: dict[int, str] = {}  # of values that have a name, or are written as they stand
        self._find_uses()
        file, first, last = scope.lines()
        self.file = file
        self.unpackings = unpackings(file, first, last) if file else []
        lines = {self.frames.line(item) for item in self.items}
        self.every_copy = copies(file, first, last, lines) if file else []
        self.copied = list(self.every_copy)
        self.at_line = 0
        self.at_key: tuple[Key, int] = ((), 0)
        self.read: set[str] = set()  # the names that the statement of the source mentions
        self.casts: dict[str, str] = {}  # and those that it casts
        self.local: dict[str, int | str] = dict(self._numbers())
        self.unpacked: dict[str, tuple[Line, int]] = {}
        self.dtypes: set[str] = set()  # the names of dtypes
        self.asked: Counter[tuple[int, str]] = Counter()  # how often an item asked for a size

    def _numbers(self) -> Iterator[tuple[str, Any]]:
        """The arguments of a function that are numbers."""
        for name, x in self.scope.call.arguments.items() if self.scope.function else ():
            if type(x) in (int, float):
                yield name, x

    def source(self, value: int) -> int:
        """The value that one is a copy of."""
        while value in self.copies:
            value = self.copies[value]
        return value

    def _is_copy(self, item: GraphNode | Scope) -> bool:
        """Whether an item gives its argument."""
        if isinstance(item, Scope):
            return item.path in self.context.layers.gone and len(item.gives) == 1
        if item.op in COPIES:
            return True
        if item.op not in _CASTS:
            return False
        before, after = self.tree.type_of(item.args[0].value), self.tree.type_of(item.made)
        return bool(before.dtype == after.dtype)

    def _first_taken(self, item: GraphNode | Scope) -> int:
        return int(item.takes[0] if isinstance(item, Scope) else item.args[0].value)

    # Which values get a name.

    def _find_uses(self) -> None:
        self.keys = self.frames.executions(self.items)
        users: dict[int, list[int]] = {}
        for i, item in enumerate(self.items):
            for v in self._taken(item):
                users.setdefault(v, []).append(i)
        for v in self.results:
            users.setdefault(v, []).append(len(self.items))
        self.users = users
        self.inlined = {i for i, item in enumerate(self.items) if self._is_inlined(i, item)}
        self.root: dict[int, int] = {}  # item -> the item in whose statement it is written
        for i in reversed(range(len(self.items))):
            self.root[i] = i
            if i in self.inlined:
                (user,) = {u for v in _made(self.items[i]) for u in users.get(v, ())}
                self.root[i] = self.root.get(user, user)
        self.last = {
            v: max(self.root.get(u, u) for u in found) for v, found in users.items() if found
        }

    def _taken(self, item: GraphNode | Scope) -> list[int]:
        found = (
            self.context.signatures.passed(item)
            if isinstance(item, Scope)
            else self.tree.taken(item)
        )
        return [self.source(v) for v in found]

    def _is_inlined(self, i: int, item: GraphNode | Scope) -> bool:
        """Whether an item is written where it is used: once, in the same statement."""
        made = _made(item)
        used = [u for v in made for u in self.users.get(v, ())]
        if len(used) != 1 or len(self._results(item)) > 1:
            return False
        if isinstance(self.tree.type_of(made[0]), list):
            return isinstance(item, GraphNode)  # its one element that is taken
        if used[0] == len(self.items):
            return len(self.results) == 1 and self.frames.returns(item)
        user = self.items[used[0]]
        if isinstance(user, Scope) and self.context.layers.repeats(user):
            return False
        if self.keys[i][0] == self.keys[used[0]][0]:
            return self.keys[i] == self.keys[used[0]]
        return not _is_getitem(item) and self.frames.continues(item, user)

    # Statements.

    def body(self) -> Body:
        """See `body_of`."""
        self._bind_arguments()
        for i, item in enumerate(self.items):
            if i not in self.inlined:
                self._statement(i, item)
        if self.copied and self.at_line:
            self._copy_before(self.copied[-1][0] + 1, len(self.items))
        self.made.lines.append(Line([], self._returned(), comment=self._reason(len(self.items))))
        self._keep_used_sizes()
        self.made.source = len({key[-1] for key, _ in self.keys})
        return self.made

    def _bind_arguments(self) -> None:
        for value, text in self.context.signatures.argument_texts(self.scope).items():
            self.texts[value] = text
            if text in self.made.parameters:
                self.names.bind(text, value, self.last.get(value, -1))
            else:
                self.names.hold(text.partition("[")[0], len(self.items) + 1)
        given = self.context.signatures.given_to(self.scope)
        for name in self.made.parameters:
            if name not in given:  # a condition may ask for it
                self.names.hold(name, len(self.items) + 1)

    def _statement(self, i: int, item: GraphNode | Scope) -> None:
        if _is_getitem(item) and item.made in self.texts:  # its list's own statement has named it
            return
        statement = self.frames.statement(item)
        self._read_sizes(item)
        self._read_copies(i, item)
        self.read = self.frames.mentioned(item)
        self.casts = self.frames.casts(item)
        text = self._text(i)
        self.casts = {}
        shape = self._targets(item)
        values = list(flat(shape))
        wanted = self.frames.targets(item, i, [
            j for j, other in enumerate(self.items) if self.keys[j] == self.keys[i]
            and j not in self.inlined and not _is_getitem(other)
        ], len(values))  # fmt: skip
        names = []
        for k, value in enumerate(values):
            last = self.last.get(value, -1)
            if value < 0 or (last < 0 and len(values) > 1):
                names.append("_")
                continue
            hint = self._hint(item, wanted, values, k)
            name = self.names.free(hint if hint.strip("_") else self._fallback(item), i)
            self.names.bind(name, value, last)
            self.local.pop(name, None)
            self.texts[value] = name
            names.append(name)
        line = Line(_grouped(shape, iter(names)), text, statement, comment=self._reason(i))
        self.made.lines.append(line)

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

    def _fallback(self, item: GraphNode | Scope) -> str:
        """A name for a value whose statement gives none."""
        if isinstance(item, Scope):
            name = item.path.rpartition(".")[2] if item.function is None else "x"
            return name if not name.isdigit() else "x"
        name = item.op.split(".")[1].strip("_")
        if name == "detach":  # of what a function under no_grad returns
            name = self.texts.get(self.source(item.args[0].value), name)
        return f"{name}_" if keyword.iskeyword(name) else name

    def _reason(self, i: int) -> str:
        """Why the statement of an item moves axes where the source does not."""
        parts = [self.items[k] for k, root in self.root.items() if root == i]
        told = [self.context.moved.reasons.get(v, "") for x in parts for v in _made(x)]
        return "; ".join(dict.fromkeys(t for t in told if t))

    def _results(self, item: GraphNode | Scope) -> list[Any]:
        """What the expression of an item gives: -1 for what only other calls of its class do."""
        if isinstance(item, GraphNode):
            return [item.made]
        return self.context.signatures.given_by(item)

    def _targets(self, item: GraphNode | Scope) -> list[Any]:
        """The values that the statement of an item names; -1 for one that nobody takes."""
        made = self._results(item)
        if len(made) > 1 or not isinstance(self.tree.type_of(made[0]), list):
            return made
        parts: dict[int, int] = {}
        for u in self.users.get(made[0], ()):
            user = self.items[u] if u < len(self.items) else None
            if not isinstance(user, GraphNode) or user.op != _GETITEM or user.args[1] in parts:
                return made
            parts[user.args[1]] = user.made
        count = len(self.tree.type_of(made[0]))
        return [parts.get(k, -1) for k in range(count)]

    # Expressions.

    def _text(self, i: int) -> str:
        item = self.items[i]
        if isinstance(item, Scope):
            return self.context.call_text(
                self.scope, item, self._value_text, self._size_text, lambda x: self._size(x, item)
            )
        if item.op == _GETITEM:
            text = self._value_text(item.args[0].value)
            return text if text.startswith("super()") else f"{text}[{item.args[1]}]"
        if self.scope.path in self.context.layers.norms and self.context.layers.is_norm(
            self.scope, item
        ):
            return f"super().__call__({self._value_text(item.args[0].value)})"
        numbers = self.tree.graph.numbers.get(item.op, frozenset())
        given = [item.args[0], _rest_open(item), *item.args[2:]] if item.args[1:] else item.args
        args = [self._argument(x, item, k in numbers) for k, x in enumerate(given)]
        kwargs = {k: self._argument(x, item, k in numbers) for k, x in item.kwargs.items()}
        return self.context.operation(item.op, self.tree.type_of(item.made), args, kwargs)

    def _value_text(self, value: int) -> str:
        value = self.source(value)
        if value in self.texts:
            names = [n for n in self.names.names(value) if n in self.read]
            newest = self.names.newest(value, self.texts[value])
            name = names[0] if len(names) == 1 else newest
            cast = self.casts.get(name, "")
            return f"{name}{cast}" if cast and self._is_cast(value, cast) else name
        if value in self.maker:
            return self._text(self.maker[value])
        return self.context.held.held_text(self.scope, value)

    def _argument(self, x: Any, node: GraphNode, is_number: bool) -> Any:
        if isinstance(x, ValueRef):
            if not self.tree.is_array(x.value):
                return self._size(self.tree.type_of(x.value), node)
            kind = self.tree.type_of(x.value)
            text = self._value_text(x.value)
            return Operand(text, kind) if isinstance(kind, ArrayType) else text
        if isinstance(x, list):
            return [self._argument(part, node, is_number) for part in x]
        if is_number and ((type(x) is int and x > 1) or type(x) is float):
            return self._size(x, node)
        return x

    # Sizes.

    def _size(self, wanted: Any, node: GraphNode | Scope) -> Any:
        """A number as the statement of the source has it, if it does."""
        if isinstance(wanted, bool) or wanted is None:
            return wanted
        known = self.made.attributes
        found = [
            (text, attributes)
            for text, attributes in self.frames.sizes(node, self.local)
            if same_size(text.value, wanted)
            and not any(known.get(name, value) != value for name, value in attributes.items())
        ]
        if found:  # of sizes that are equal by chance, the first time the first
            times = self.asked[id(node), str(wanted)] = self.asked[id(node), str(wanted)] + 1
            text, attributes = found[min(times, len(found)) - 1]
            known |= attributes
            self._ask_for(text.text)
            return text
        return (
            wanted if isinstance(wanted, int | float) else SizeText(self._size_text(wanted), wanted)
        )

    def _ask_for(self, text: str) -> None:
        """Have the numbers that a function's text mentions among its parameters."""
        given = dict(self._numbers())
        for name in words(text) if given else ():
            if name in given:
                self.context.signatures.number(self.scope, name)

    def _size_text(self, wanted: str) -> str:
        return self._axis(wanted) or composed(wanted, self._symbol)

    def _symbol(self, symbol: str) -> str:
        if (found := self._axis(symbol)) is not None:
            return found
        if not self.scope.is_model:
            return self.context.signatures.size(self.scope, symbol)
        return self._size_of_input(symbol)

    def _size_of_input(self, symbol: str) -> str:
        """A name for an axis of an input of the model, which no array that has a name has now."""
        path, axis = self.tree.graph.symbols[symbol]
        value = next(p.value for p in self.tree.graph.of_kind("input") if p.name == path)
        order = self.tree.orders.get(value)
        text = self.context.signatures.argument_texts(self.scope)[value]
        name = self.names.free("size", len(self.items))
        line = Line([name], f"{text}.shape[{axis if order is None else order.index(axis)}]")
        self.made.lines.insert(0, line)
        self.local[name] = symbol
        self.names.hold(name, len(self.items) + 1)
        self.unpacked[name] = (line, 0)
        return name

    def _axis(self, wanted: str) -> str | None:
        """`x.shape[1]`, of an array that has a name now."""
        for name, size in self.local.items():
            if size == wanted:
                return name
        # The array that the statement mentions, rather than another of that size.
        for name, value in sorted(self.names.bound.items(), key=lambda n: n[0] not in self.read):
            kind = self.tree.type_of(value)
            shape = kind.shape if isinstance(kind, ArrayType) else ()
            if wanted in shape:
                return f"{name}.shape[{shape.index(wanted)}]"
        for value, text in self.texts.items():
            kind = self.tree.type_of(value)
            if "[" in text and isinstance(kind, ArrayType) and wanted in kind.shape:
                return f"{text}.shape[{kind.shape.index(wanted)}]"
        return None

    def _read_sizes(self, item: GraphNode | Scope) -> None:
        """Name the sizes that the source names before this line."""
        line = self.frames.line(item)
        while line and self.unpackings and self.unpackings[0].line <= line:
            found = self.unpackings.pop(0)
            value = self.names.bound.get(found.array)
            kind = self.tree.type_of(value) if value is not None else None
            if not isinstance(kind, ArrayType):
                continue
            order = self.tree.orders.get(value, ()) if value is not None else ()
            self._unpack(_as_it_lies(found, order), kind.shape)

    def _read_copies(self, i: int, item: GraphNode | Scope) -> None:
        """Give values their second names, where the source does before this line."""
        line = self.frames.line(item)
        if not line:
            return
        again = self.keys[i][0] == self.at_key[0] and self.keys[i] != self.at_key
        if line < self.at_line or again:  # another round of a loop: first the end of the last one
            loop = source_file(self.file).loop_around(line)
            first, end = (loop.lineno, loop.end_lineno or 0) if loop else (line, 0)
            self._copy_before(end + 1, i)
            self.copied = [c for c in self.every_copy if c[0] > first]
        self.at_line, self.at_key = line, self.keys[i]
        self._copy_before(line, i)

    def _copy_before(self, line: int, now: int) -> None:
        while self.copied and self.copied[0][0] < line:
            _, name, other, behind = self.copied.pop(0)
            if ", " in name:
                self._open_tuple(name.split(", "), other, now)
                continue
            value = self.names.bound.get(other)
            if value is None or (name != other and not self.names.is_free(name, now - 1)):
                continue
            if behind and not self._is_cast(value, behind):
                continue
            if behind == ".dtype":
                self.dtypes.add(name)
                self.names.hold(name, len(self.items) + 1)
            else:
                self.names.bind(name, value, self.last.get(value, -1))
            self.made.lines.append(Line([name], f"{other}{behind}"))

    def _open_tuple(self, names: list[str], other: str, now: int) -> None:
        """Name the parts of an argument that is a tuple, where they are used."""
        tree = self.scope.call.arguments.get(other)
        values = (
            [x.value for x in tree if isinstance(x, ValueRef)] if isinstance(tree, list) else []
        )
        used = any(self.last.get(v, -1) >= now for v in values)
        if len(values) != len(names) or not used or other not in self.made.parameters:
            return
        if all(self.names.is_free(n, now - 1) for n in names) and len(set(values)) == len(values):
            for name, value in zip(names, values, strict=True):
                self.names.bind(name, value, self.last.get(value, -1))
            self.made.lines.append(Line(names, other))

    def _is_cast(self, value: int, behind: str) -> bool:
        """Whether a cast of the source, which does nothing to this value here, can be written."""
        kind = self.tree.type_of(value)
        floats = isinstance(kind, ArrayType) and "float" in kind.dtype
        to = behind.removeprefix(".astype(").removesuffix(")")
        owner, _, attribute = to.partition(".")
        known = attribute == "dtype" and owner in self.names.bound
        return floats and (behind == ".dtype" or owner == "jnp" or known or to in self.dtypes)

    def _unpack(self, found: Any, shape: tuple[int | str, ...]) -> None:
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
        if any(n and not self.names.is_free(n, len(self.items)) for n, _ in pairs):
            return
        line = Line([n or "_" for n, _ in pairs], text)
        self.made.lines.append(line)
        for k, (name, size) in enumerate(pairs):
            if name:
                self.local[name] = size
                self.names.hold(name, len(self.items) + 1)
                self.unpacked[name] = (line, k)

    def _keep_used_sizes(self) -> None:
        """Leave out the names of sizes that nothing mentions."""
        lines = self.made.lines
        mentioned = Counter(w for line in lines for w in words(line.text))
        for name, (line, k) in self.unpacked.items():
            if not mentioned[name]:
                line.targets[k] = "_"
        self.made.lines = [x for x in lines if not x.targets or set(x.targets) != {"_"}]

    def _returned(self) -> str:
        self.read = mentioned(source_file(self.file).last_return(*self.scope.lines()[1:]))
        if (last := self.maker.get(self.results[-1]) if self.results else None) is not None:
            self.casts = self.frames.casts(self.items[last]) if last in self.inlined else {}
        texts = {v: self._value_text(v) for v in self.results}
        return self.context.returned(self.scope, lambda v: texts[self.source(v)])


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


def _is_getitem(item: GraphNode | Scope) -> TypeGuard[GraphNode]:
    return isinstance(item, GraphNode) and item.op == _GETITEM


def flat(tree: Any) -> Iterator[int]:
    """The values in nested lists."""
    for part in tree:
        if isinstance(part, list):
            yield from flat(part)
        else:
            yield part


def _grouped(shape: Any, names: Iterator[str]) -> list[str]:
    """Names as the targets of nested lists: `out`, `(h, c)`."""
    made = []
    for part in shape:
        inner = _grouped(part, names) if isinstance(part, list) else []
        closed = f"({', '.join(inner)}{',' * (len(inner) == 1)})"
        made.append(closed if isinstance(part, list) else next(names))
    return made


_VIEWS = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")


def _rest_open(item: GraphNode) -> Any:
    """The second argument of an operation; of one that flattens axes, which are one number then,
    that is left open as in the source."""
    shape, site = item.args[1], item.site
    flattens = item.op in _VIEWS and site is not None and "flatten" in site.text
    if not flattens or type(shape[-1]) is not int or shape[-1] < 2 or -1 in shape:
        return shape
    return [*shape[:-1], -1] if any(isinstance(n, ValueRef) for n in shape) else shape


def _made(item: GraphNode | Scope) -> list[int]:
    return item.gives if isinstance(item, Scope) else [item.made]
