"""The statements of the source that compute nothing: `y = x`, `a, b = pair`, casts that are none
here."""

from __future__ import annotations

from convert.porting.rendering.draft import Draft
from convert.porting.rendering.names import Key
from convert.porting.rendering.scopes import Scope
from convert.porting.rendering.source_lines import Copy, copies, source_file
from convert.porting.rendering.statements import Line
from convert.program.graph import ArrayType, GraphNode, ValueRef


class SecondNames:
    """Writes them where the source has them. `casts` are those in the statement at hand, by the
    names that they cast."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        lines = {draft.frames.line(item) for item in draft.items.items}
        span = draft.first_line, draft.last_line
        self._every: list[Copy] = copies(draft.file, *span, lines) if draft.file else []
        self._left = list(self._every)
        self._line = 0
        self._key: tuple[Key, int] = ((), 0)
        self._dtypes: set[str] = set()  # the names of dtypes
        self.casts: dict[str, str] = {}

    def before(self, i: int, item: GraphNode | Scope) -> None:
        """Those that the source has before the statement of an item."""
        line, key = self.draft.frames.line(item), self.draft.items.keys[i]
        if not line:
            return
        again = key[0] == self._key[0] and key != self._key
        if line < self._line or again:  # another round of a loop: first the end of the last one
            loop = source_file(self.draft.file).loop_around(line)
            first, end = (loop.lineno, loop.end_lineno or 0) if loop else (line, 0)
            self._write(end + 1, i)
            self._left = [c for c in self._every if c[0] > first]
        self._line, self._key = line, key
        self._write(line, i)

    def rest(self) -> None:
        """Those after the last statement."""
        if self._left and self._line:
            self._write(self._left[-1][0] + 1, len(self.draft.items))

    def is_cast(self, value: int, behind: str) -> bool:
        """Whether a cast of the source, which does nothing to this value here, can be written."""
        kind = self.draft.tree.type_of(value)
        floats = isinstance(kind, ArrayType) and "float" in kind.dtype
        to = behind.removeprefix(".astype(").removesuffix(")")
        owner, _, attribute = to.partition(".")
        known = attribute == "dtype" and owner in self.draft.names.bound
        return floats and (behind == ".dtype" or owner == "jnp" or known or to in self._dtypes)

    def _write(self, line: int, now: int) -> None:
        """Those before a line, at the time of this statement."""
        names = self.draft.names
        while self._left and self._left[0][0] < line:
            _, name, other, behind = self._left.pop(0)
            if ", " in name:
                self._open(name.split(", "), other, now)
                continue
            value = names.bound.get(other)
            if value is None or (name != other and not names.is_free(name, now - 1)):
                continue
            if behind and not self.is_cast(value, behind):
                continue
            if behind == ".dtype":
                self._dtypes.add(name)
                names.hold(name, self.draft.end)
            else:
                self.draft.bind(name, value)
            self.draft.body.lines.append(Line([name], f"{other}{behind}"))

    def _open(self, wanted: list[str], other: str, now: int) -> None:
        """Name the parts of an argument that is a tuple, where they are used."""
        names, last = self.draft.names, self.draft.items.last
        tree = self.draft.scope.call.arguments.get(other)
        parts = tree if isinstance(tree, list) else []
        values = [x.value for x in parts if isinstance(x, ValueRef)]
        used = any(last.get(v, -1) >= now for v in values)
        if len(values) != len(wanted) or not used or other not in self.draft.body.parameters:
            return
        if all(names.is_free(n, now - 1) for n in wanted) and len(set(values)) == len(values):
            for name, value in zip(wanted, values, strict=True):
                self.draft.bind(name, value)
            self.draft.body.lines.append(Line(wanted, other))
