"""What all bodies of a port share: how calls, operations and results are written."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from convert.porting.image_axes.moved import Relaid
from convert.porting.rendering.argument_text import numbers, reached, tree_text
from convert.porting.rendering.held_arrays import HeldArrays
from convert.porting.rendering.layer_calls import LayerCalls
from convert.porting.rendering.not_rendered import Again
from convert.porting.rendering.operands import ArrayType, Operand, SizeText
from convert.porting.rendering.scopes import Scope, Tree
from convert.porting.rendering.signatures import Signatures, size_name
from convert.porting.rendering.templates import expression
from convert.porting.rendering.templates.drawing import KEYS
from convert.porting.rendering.written_rules import WrittenRules, written
from convert.porting.rules import find
from convert.porting.rules.elementwise import COPIES
from convert.porting.tensors_by_name import ByName
from convert.program.exported_nodes import as_size
from convert.program.graph import ValueRef
from convert.program.nesting import LEAF, Nesting


class Context:
    """See the module's first lines. `taken` are names that the file has from elsewhere, and that no
    class of it can have; `tuples` the NamedTuples that the model returns; `moved` says what has
    other axes than in torch."""

    def __init__(self, tree: Tree, by_name: ByName, module: Any, moved: Relaid) -> None:
        self.tree, self.by_name, self.moved = tree, by_name, moved
        self.layers = LayerCalls(tree, moved.layers)
        self.signatures = Signatures(tree, self.layers)
        self.held = HeldArrays(tree, by_name, module, moved.tensors)
        self.tuples: dict[str, dict[str, str]] = {}  # their fields, with types
        self.draws: set[str] = set()  # the operations that take keys
        self.functions: dict[int, str] = {}  # the names of those of the file, by their calls
        self.returns: dict[int, list[str]] = {}  # and what these call the arrays that they return
        texts = [*self.layers.texts.values(), *self.layers.norms.values()]
        lines = {line for layer in texts for line in layer.imports}
        imported = {w for line in lines for w in re.findall(r"\w+", line.partition("import")[2])}
        self.taken = {"Array", "Any", "NamedTuple", "Path", "Buffer", "Constant", "Sequential",
                      "NamedSequential"}  # fmt: skip
        self.taken |= imported
        self._classes = {type(m).__name__ for m in tree.modules.values()}
        self.taken |= {s.function.__name__ for s in tree.root.functions()}
        self._written = self._without_template()
        self.rules = self.written()
        self._called: set[str] = set()  # the operations whose rules the file calls

    def begin(self) -> None:
        """Write all of it again."""
        self._called.clear()

    def written(self, blocks: Iterable[tuple[str, str]] = ()) -> WrittenRules:
        """The rules that the file may call, and these blocks of zoo.nn."""
        return written(self._written, self.taken | self._classes, blocks)

    def called(self, blocks: Iterable[tuple[str, str]] = ()) -> WrittenRules:
        """Those that it does call, under the same names."""
        ops = [op for op in self._written if op in self._called]
        found = written(ops, self.taken | self._classes, blocks)
        same = all(found.functions[op] == self.rules.functions[op] for op in ops)
        return found if same else self.written(blocks)

    def call_text(
        self,
        parent: Scope,
        scope: Scope,
        text: Callable[[int], str],
        size: Callable[[str], str],
        number: Callable[[Any], Any],
    ) -> str:
        """The call of a part, or of a function; `text`, `size` and `number` write arrays, sizes,
        and the numbers that a function is given."""
        if scope.function is not None:
            target = self.functions[id(scope)]
        else:
            target = reached(parent.path, scope.path, self.tree.modules)
        given = scope.call.arguments
        if self.layers.is_layer(scope):
            found = self.layers.call_text(scope, target, lambda tree: tree_text(tree, text))
            if (
                self.layers.texts[scope.path].call("self", ["x"], {}) == "x"
            ):  # others have a layer here
                return f"{target}({found})"
            return found or ""
        if scope.function is None and self.layers.is_sequence(scope.path):
            return f"{target}({text(scope.takes[0])})"
        args_text, keywords = [], False
        extra = iter(self.signatures.extra(scope))
        sizes = dict(
            zip(map(size_name, range(99)), self.signatures.sizes.get(id(scope), ()), strict=False)
        )
        for name in self.signatures.parameters_of(scope):
            if name in self.signatures.plain(scope):
                value = given[name]
                written = repr(value) if scope.function is None else f"{number(as_size(value))}"
            elif name in sizes and name not in given:
                written = size(sizes[name])
            elif name.startswith("extra") and name not in given:
                more = next(extra, None)
                written = "None" if more is None else text(more)
            else:
                taken = set(scope.takes)
                written = tree_text(given.get(name), lambda v: text(v) if v in taken else "None")  # noqa: B023
            written = _as_given(written, parent)
            keywords = keywords or written == "None"
            if written != "None":
                args_text.append(f"{name}={written}" if keywords else written)
        return f"{target}({', '.join(args_text)})"

    def operation(self, op: str, out: Any, args: list[Any], kwargs: Mapping[str, Any]) -> str:
        """An operation as JAX has it, or a call of its rule, which the file then holds."""
        try:
            found = expression(op, out, args, kwargs)
        except (TypeError, ValueError):  # a name where only a number will do
            args, kwargs = numbers(args), numbers(dict(kwargs))
            found = expression(op, out, args, kwargs)
        if found is None and op not in self.rules.functions:
            self._written = [*self._written, op]
            self.rules = self.written()
            raise Again
        if found is None:
            self._called.add(op)
        text = self.rules.call(op, out, args, kwargs) if found is None else found
        rule = find(op)
        if rule is not None and rule.random and KEYS in text:
            self.draws.add(op)
        return text

    def _without_template(self) -> list[str]:
        """The operations that no expression can be written for somewhere."""

        def operand(x: Any) -> Any:
            if isinstance(x, ValueRef):
                kind = self.tree.type_of(x.value)
                return Operand("x", kind) if isinstance(kind, ArrayType) else SizeText("n", kind)
            return [operand(part) for part in x] if isinstance(x, list) else x

        found: dict[str, None] = {}
        opened = (s for s in self.tree.root.every() if not self.layers.is_layer(s))
        norms = self.layers.norms
        every = ((s, i) for s in opened for i in s.items if not isinstance(i, Scope))
        for node in (i for s, i in every if s.path not in norms or not self.layers.is_norm(s, i)):
            args = [operand(x) for x in node.args]
            kwargs = {k: operand(x) for k, x in node.kwargs.items()}
            own = node.op.startswith("operator.") or node.op in COPIES
            if not own and expression(node.op, self.tree.type_of(node.made), args, kwargs) is None:
                found[node.op] = None
        return list(found)

    def returned(self, scope: Scope, text: Callable[[int], str]) -> str:
        """What a call returns."""
        if scope.is_model:
            graph = self.tree.graph
            leaves = iter(
                text(r.value) if isinstance(r, ValueRef) else repr(r) for r in graph.results
            )
            return self._nested(graph.outputs, leaves)
        texts = ["None" if v is None else text(v) for v in self.signatures.results_of(scope)]
        return texts[0] if len(texts) == 1 else ", ".join(texts) or "None"

    def _nested(self, nesting: Nesting, leaves: Iterator[str]) -> str:
        if nesting.kind == LEAF:
            return next(leaves)
        parts = [self._nested(part, leaves) for part in nesting.parts]
        if nesting.kind == "dict":
            pairs = zip(nesting.keys, parts, strict=True)
            return f"{{{', '.join(f'{k!r}: {x}' for k, x in pairs)}}}"
        if nesting.kind == "named":
            name = nesting.cls.__name__
            kinds = ["Array" if p.kind == LEAF and _is_name(x) else "Any"
                     for p, x in zip(nesting.parts, parts, strict=True)]  # fmt: skip
            fields = dict(zip(nesting.cls._fields, kinds, strict=True))
            while self.tuples.setdefault(name, fields) != fields:
                name += "_"
            return f"{name}({', '.join(f'{k}={x}' for k, x in zip(fields, parts, strict=True))})"
        if nesting.kind == "list":
            return f"[{', '.join(parts)}]"
        return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"


def _as_given(text: str, parent: Scope) -> str:
    """An argument of the parent that is handed on as it came: `x` for `(x[0], x[1])`."""
    name = text.removeprefix("(").partition("[")[0]
    tree = parent.call.arguments.get(name)
    parts = [f"{name}[{k}]" for k in range(len(tree))] if isinstance(tree, list) else []
    return name if parts and text == f"({', '.join(parts)})" else text


def _is_name(text: str) -> bool:
    """Whether the text of a leaf is an array's: no number, word or None."""
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return True
    return False
