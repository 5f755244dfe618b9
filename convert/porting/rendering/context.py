"""What all bodies of a port share: where tensors and parts are, and how calls are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from convert.porting.rendering.constants import array_text
from convert.porting.rendering.constructor import Constructor, LayerText, Name
from convert.porting.rendering.inits import MadeVariable
from convert.porting.rendering.layer_text import layer_text
from convert.porting.rendering.operands import ArrayType, Operand, SizeText, inside
from convert.porting.rendering.scopes import Scope, Tree
from convert.porting.rendering.templates import expression
from convert.porting.rendering.written_rules import written
from convert.porting.tensors_by_name import ByName
from convert.program.graph import GraphNode, ValueRef, refs
from convert.program.nesting import LEAF, Nesting
from convert.tensors import bits_of
from zoo.containers.errors import UsageError
from zoo.layout.ops import Concat, Flip, Permute, inverse

# What gives its argument: copies, which JAX's arrays do not need.
COPIES = {"aten.clone.default", "aten.alias.default", "aten.lift_fresh_copy.default",
          "aten.contiguous.default"}  # fmt: skip


# The operation that a layer of torch's is.
_OPERATIONS = {
    "Linear": "aten.linear.default",
    "LayerNorm": "aten.layer_norm.default",
    "GroupNorm": "aten.group_norm.default",
    "Embedding": "aten.embedding.default",
    "Conv1d": "aten.conv1d.default",
    "Conv2d": "aten.conv2d.default",
    "Conv3d": "aten.conv3d.default",
}


class NotRendered(UsageError):
    """What cannot be written as source."""

    def __init__(self, why: str) -> None:
        super().__init__(f"this module cannot be written as source: {why}", "use convert.to_flax")


class Again(Exception):
    """A class needs an argument that its calls so far do not give: write all of it again."""


class Context:
    """See the module's first lines."""

    def __init__(self, tree: Tree, by_name: ByName, module: Any) -> None:
        self.tree, self.by_name = tree, by_name
        self.tensors = dict(module.named_parameters(remove_duplicate=False))
        self.trained = set(self.tensors)
        self.tensors |= dict(module.named_buffers(remove_duplicate=False))
        self.arrays: dict[str, np.ndarray] = {}  # that the source cannot say: kept beside it
        self.kinds: dict[str, None] = {}  # of variables, but for Flax's own
        self.layers: dict[str, LayerText] = {}
        self.tuples: dict[str, tuple[str, ...]] = {}  # NamedTuples that the model returns
        self._sequences: dict[str, bool] = {}
        self.sizes: dict[int, list[str]] = {}  # of a call, those that it is given as arguments
        self.classes: dict[type, list[Scope]] = {}
        for scope in tree.root.scopes():
            self.classes.setdefault(type(scope.module), []).append(scope)
        alone = self._alone()
        for path, module in tree.modules.items():
            if path and (layer := layer_text(module, checked=path in alone)) is not None:
                self.layers[path] = layer
        self.gone = {p for p in self.layers if self._is_gone(p)}
        lines = {line for layer in self.layers.values() for line in layer.imports}
        imported = {w for line in lines for w in re.findall(r"\w+", line.partition("import")[2])}
        # Names that the file has from elsewhere, and that no class of it can have.
        self.taken = {"Array", "Any", "NamedTuple", "Path", "Buffer", "Constant", "Sequential"}
        self.taken |= imported
        self._classes = {type(m).__name__ for m in tree.modules.values()}
        self._written = self._without_template()
        self.rules = written(self._written, self.taken | self._classes)

    def _alone(self) -> set[str]:
        """The modules of classes derived from a layer of torch's, of which every call is that
        layer's operation on its own tensors and nothing else."""
        found: dict[str, bool] = {}
        for scope in self.tree.root.scopes():
            nodes = [n for n in scope.nodes() if n.op not in COPIES]
            wanted = _OPERATIONS.get(_layer_class(scope.module), "")
            own = {f"{scope.path}.{n}" for n, _ in scope.module.named_parameters(recurse=False)}
            held = [self.tree.placeholders.get(v) for n in nodes[:1] for v in self.tree.taken(n)]
            names = [p.name for p in held if p is not None and p.kind != "input"]
            good = len(nodes) == 1 and nodes[0].op == wanted and set(names) == own
            found[scope.path] = found.get(scope.path, True) and good
        return {path for path, good in found.items() if good}

    def _is_gone(self, path: str) -> bool:
        """Whether a layer hands its argument on, and so do all in its place in other instances."""
        if self.layers[path].call("self", ["x"], {}) != "x" or self.layers[path].constructor:
            return False
        owner, _, name = path.rpartition(".")
        of = type(self.tree.modules[owner])
        return all(
            type(getattr(m, name, None)) is type(self.tree.modules[path])
            for m in self.tree.modules.values()
            if type(m) is of and hasattr(m, name)
        )

    # What is a call of its own.

    def is_layer(self, scope: Scope) -> bool:
        """Whether a call is of a layer that Flax has too, with tensors of its own."""
        if scope.path not in self.layers or not scope.gives:
            return False
        nesting = scope.call.nesting
        passed = {r.value for r in scope.call.results if isinstance(r, ValueRef)}
        if nesting is None or not _is_tuples(nesting) or not passed.issuperset(scope.gives):
            return False
        given = [x for x in scope.call.arguments.values() if x is not None]
        if self._layer_text(scope, "self", lambda tree: "x") is None:
            return False
        held = {v for n in scope.nodes() for v in self.tree.taken(n) if v in self.tree.placeholders}
        arrays = set(refs(given))
        return all(v in arrays or self.tree.own(v, scope.path) for v in held)

    def _layer_text(self, scope: Scope, target: str, text: Callable[[Any], str]) -> str | None:
        """The call of a layer; None for one that it cannot be called with. Arguments behind one
        that is left out go by their names."""
        given = scope.call.arguments
        args: list[str] = []
        kwargs: dict[str, str] = {}
        for k, name in enumerate(scope.call.signature):
            if given.get(name) is None:
                continue
            if len(args) == k:
                args.append(text(given[name]))
            else:
                kwargs[name] = text(given[name])
        return self.layers[scope.path].call(target, args, kwargs)

    def repeats(self, scope: Scope) -> bool:
        """Whether the text of a layer holds its argument more than once."""
        if not self.is_layer(scope):
            return False
        given = [x for x in scope.call.arguments.values() if x is not None]
        names = [f"_{k}_" for k in range(len(given))]
        numbered = iter(names)
        text = self._layer_text(scope, "self", lambda tree: next(numbered)) or ""
        return any(text.count(n) > 1 for n in names)

    def is_sequence(self, path: str) -> bool:
        """Whether a module is a Sequential that calls its parts one after another, or is only
        looked into."""
        if path not in self._sequences:
            self._sequences[path] = self._looks_sequence(path)
        return self._sequences[path]

    def _looks_sequence(self, path: str) -> bool:
        import torch

        module = self.tree.modules[path]
        names = [n for n, _ in module.named_children()]
        if type(module).forward is not torch.nn.Sequential.forward:
            return False
        if names != [str(i) for i in range(len(names))] or module._parameters or module._buffers:
            return False
        calls = [s for s in self.tree.root.scopes() if s.path == path]
        return all(map(self._is_chain, calls))

    def _is_chain(self, scope: Scope) -> bool:
        last = scope.call.results[0] if len(scope.call.results) == 1 else None
        given = [v for v in scope.call.arguments.values() if isinstance(v, ValueRef)]
        if len(given) != 1 or not isinstance(last, ValueRef) or len(scope.call.arguments) != 1:
            return False
        now = given[0].value
        for item in scope.items:
            if not isinstance(item, Scope) or item.path.rpartition(".")[0] != scope.path:
                return False
            if item.path in self.layers and not self.is_layer(item) and item.gives:
                return False
            if not item.gives:
                continue
            if item.takes != [now] or len(item.gives) != 1:
                return False
            now = item.gives[0]
        return now == last.value

    def spliced(self, scope: Scope) -> Iterator[GraphNode | Scope]:
        """The items of a call, those inside it that are no calls of their own opened."""
        for item in scope.items:
            if isinstance(item, Scope) and item.path in self.layers and not self.is_layer(item):
                yield from self.spliced(item)
            elif isinstance(item, Scope) and not _is_below(item.path, scope.path):
                raise NotRendered(f"{item.path} is called inside {scope.path}")
            else:
                yield item

    # The signature of a class, the same for all its calls.

    def parameters_of(self, scope: Scope) -> list[str]:
        """The arguments of forward by which any call of this class takes arrays, in order."""
        found: dict[str, None] = {}
        extra = 0
        for one in self.classes[type(scope.module)]:
            for name, tree in one.call.arguments.items():
                if set(refs(tree)) & set(one.takes):
                    found.setdefault(name)
            extra = max(extra, len(self._extra(one)))
        order = list(scope.call.signature)
        names = sorted(found, key=lambda n: order.index(n) if n in order else len(order))
        names += [f"extra{k or ''}" for k in range(extra)]
        names += self.size_names(scope)
        return sorted(names, key=lambda n: self.is_optional(n, scope))

    def size_names(self, scope: Scope) -> list[str]:
        """The parameters of a class that are sizes."""
        count = max(len(self.sizes.get(id(s), ())) for s in self.classes[type(scope.module)])
        return [_size_name(k) for k in range(count)]

    def size(self, scope: Scope, symbol: str) -> str:
        """The argument by which a call gets a size that is of no array in it."""
        held = self.sizes.setdefault(id(scope), [])
        if symbol not in held:
            held.append(symbol)
            raise Again
        return _size_name(held.index(symbol))

    def is_optional(self, name: str, scope: Scope) -> bool:
        """Whether some calls of a class do not give this argument."""
        if name.startswith("extra") or name in self.size_names(scope):
            return False
        return any(
            not set(refs(one.call.arguments.get(name))) & set(one.takes)
            for one in self.classes[type(scope.module)]
        )

    def _extra(self, scope: Scope) -> list[int]:
        """The arrays that a call takes by other ways than its arguments."""
        given = set(refs(list(scope.call.arguments.values())))
        return [v for v in scope.takes if v not in given]

    def results_of(self, scope: Scope) -> list[int | None]:
        """The values that any call of this class gives, in order; None for one that this call has
        not."""
        if not scope.path:
            return [r.value for r in self.tree.graph.results if isinstance(r, ValueRef)]
        places: dict[Any, None] = {}
        for one in self.classes[type(scope.module)]:
            places |= dict.fromkeys(self._places(one))
        held = {place: v for v, place in zip(scope.gives, self._places(scope), strict=True)}
        return [held.get(place) for place in sorted(places)]

    def given_by(self, scope: Scope) -> list[Any]:
        """What the expression that calls a part gives, in nested lists; -1 for what this call has
        not, or nobody takes."""
        if self.is_layer(scope):
            leaves = iter(scope.call.results)
            made = _nested(scope.call.nesting, leaves, set(scope.gives))
            return made if isinstance(made, list) else [made]
        if self.is_sequence(scope.path):
            return list(scope.gives)
        return [-1 if v is None else v for v in self.results_of(scope)]

    def _places(self, scope: Scope) -> list[tuple[int, int]]:
        """Where in what it returns each of the values that a call gives stands."""
        passed = [r.value if isinstance(r, ValueRef) else -1 for r in scope.call.results]
        return [
            (passed.index(v), 0) if v in passed else (len(passed), k)
            for k, v in enumerate(scope.gives)
        ]

    # Text.

    def argument_texts(self, scope: Scope) -> dict[int, str]:
        """The arrays that a call takes, as its own code names them."""
        found: dict[int, str] = {}
        for name, tree in scope.call.arguments.items():
            for value, text in _leaves(tree, name):
                if value in scope.takes:
                    found.setdefault(value, text)
        for k, value in enumerate(self._extra(scope)):
            found[value] = f"extra{k or ''}"
        return found

    def passed(self, scope: Scope) -> list[int]:
        """The arrays that are written in the call of a part."""
        if self.is_layer(scope):
            return [v for v in refs(list(scope.call.arguments.values())) if self.tree.is_array(v)]
        if self.is_sequence(scope.path):
            return scope.takes
        trees = [scope.call.arguments.get(n) for n in self.parameters_of(scope)]
        return [v for v in refs(trees) if v in scope.takes] + self._extra(scope)

    def call_text(
        self,
        parent: Scope,
        scope: Scope,
        text: Callable[[int], str],
        size: Callable[[str], str],
    ) -> str:
        """The call of a part; `text` and `size` write arrays and sizes."""
        target = reached(parent.path, scope.path, self.tree.modules)
        given = scope.call.arguments
        if self.is_layer(scope):
            found = self._layer_text(scope, target, lambda tree: _tree_text(tree, text))
            if self.layers[scope.path].call("self", ["x"], {}) == "x":  # others have a layer here
                return f"{target}({found})"
            return found or ""
        if self.is_sequence(scope.path):
            return f"{target}({text(scope.takes[0])})"
        args_text, keywords = [], False
        extra = iter(self._extra(scope))
        sizes = dict(zip(map(_size_name, range(99)), self.sizes.get(id(scope), ()), strict=False))
        for name in self.parameters_of(scope):
            if name in sizes and name not in given:
                written = size(sizes[name])
            elif name.startswith("extra") and name not in given:
                written = text(next(extra))
            else:
                taken = set(scope.takes)
                written = _tree_text(given.get(name), lambda v: text(v) if v in taken else "None")  # noqa: B023
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
            self.rules = written(self._written, self.taken | self._classes)
            raise Again
        return self.rules.call(op, out, args, kwargs) if found is None else found

    def _without_template(self) -> list[str]:
        """The operations that no expression can be written for somewhere."""

        def operand(x: Any) -> Any:
            if isinstance(x, ValueRef):
                kind = self.tree.type_of(x.value)
                return Operand("x", kind) if isinstance(kind, ArrayType) else SizeText("n", kind)
            return [operand(part) for part in x] if isinstance(x, list) else x

        found: dict[str, None] = {}
        opened = (s for s in self.tree.root.scopes() if not self.is_layer(s))
        for node in (i for s in opened for i in s.items if not isinstance(i, Scope)):
            args = [operand(x) for x in node.args]
            kwargs = {k: operand(x) for k, x in node.kwargs.items()}
            own = node.op.startswith("operator.") or node.op in COPIES
            if not own and expression(node.op, self.tree.type_of(node.made), args, kwargs) is None:
                found[node.op] = None
        return list(found)

    def held_text(self, scope: Scope, value: int) -> str:
        """A tensor that the module at a path holds, in torch's axes."""
        p = self.tree.placeholders[value]
        if p.kind == "constant":
            return f"jnp.asarray({self._array(p.name, self.tree.graph.constants[p.name])})"
        entry = self.by_name.flax_of(p.name)
        if entry is None:
            return f"{reached(scope.path, p.name, self.tree.modules)}[...]"
        arrays = [f"{reached(scope.path, t.name, self.tree.modules)}[...]" for t in entry.flax]
        if len(entry.torch) > 1:
            raise NotRendered(f"{p.name} is one of several tensors of one in Flax")
        for op in inverse(entry.ops, [t.shape for t in entry.torch]):
            if isinstance(op, Permute):
                arrays = [_permuted(a, op.axes) for a in arrays]
            elif isinstance(op, Flip):
                arrays = [f"jnp.flip({a}, {op.axes})" for a in arrays]
            elif isinstance(op, Concat):
                arrays = [f"jnp.concatenate([{', '.join(arrays)}], axis={op.axis})"]
            else:
                raise NotRendered(f"{p.name} lies otherwise in Flax")
        return arrays[0]

    def filled(self, kind: str, home: str, tensor: Any, shape: tuple[int, ...]) -> MadeVariable:
        """What makes a parameter or buffer of a module's own."""
        if kind in ("Buffer", "Constant"):
            self.kinds[kind] = None
            return MadeVariable(kind, Name(self._array(home, bits_of(tensor))))
        tensor = tensor.detach()
        low, high = float(tensor.min()), float(tensor.max())
        if low == high and low in (0.0, 1.0):
            return MadeVariable(kind, Constructor("jnp.ones" if low else "jnp.zeros", (shape,)))
        if low == high:
            return MadeVariable(kind, Constructor("jnp.full", (shape, float(f"{low:.7g}"))))
        spread = float(f"{float(tensor.float().std(correction=0)):.1g}") or 1.0
        callee = f"nnx.initializers.normal({spread})"
        return MadeVariable(kind, Constructor(callee, (Name("rngs.params()"), shape)))

    def _array(self, home: str, array: np.ndarray) -> str:
        """The text of an array, or of where it is kept."""
        if (said := array_text(array)) is not None:
            return said
        for name, held in self.arrays.items():
            if held.dtype == array.dtype and np.array_equal(held, array):
                return f"ARRAYS[{name!r}]"
        self.arrays[home] = array
        return f"ARRAYS[{home!r}]"

    def returned(self, scope: Scope, text: Callable[[int], str]) -> str:
        """What a call returns."""
        if not scope.path:
            graph = self.tree.graph
            leaves = iter(
                text(r.value) if isinstance(r, ValueRef) else repr(r) for r in graph.results
            )
            return self._nested(graph.outputs, leaves)
        texts = ["None" if v is None else text(v) for v in self.results_of(scope)]
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
            fields = nesting.cls._fields
            while self.tuples.setdefault(name, fields) != fields:
                name += "_"
            return f"{name}({', '.join(f'{k}={x}' for k, x in zip(fields, parts, strict=True))})"
        if nesting.kind == "list":
            return f"[{', '.join(parts)}]"
        return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"


def _is_tuples(nesting: Nesting) -> bool:
    return nesting.kind in (LEAF, "tuple") and all(map(_is_tuples, nesting.parts))


def _nested(nesting: Any, leaves: Iterator[Any], wanted: set[int]) -> Any:
    """The values of a result in nested lists, -1 for those that are not wanted."""
    if nesting.kind == LEAF:
        found = next(leaves)
        return found.value if isinstance(found, ValueRef) and found.value in wanted else -1
    return [_nested(part, leaves, wanted) for part in nesting.parts]


def _size_name(k: int) -> str:
    return f"size{k or ''}"


def _layer_class(module: Any) -> str:
    return next((c.__name__ for c in type(module).__mro__ if c.__name__ in _OPERATIONS), "")


def numbers(tree: Any) -> Any:
    """Arguments with numbers in place of their names, where they are numbers."""
    if isinstance(tree, SizeText) and not isinstance(tree.value, str):
        return tree.value
    if isinstance(tree, dict):
        return {k: numbers(x) for k, x in tree.items()}
    return [numbers(x) for x in tree] if isinstance(tree, list) else tree


def reached(origin: str, path: str, modules: Mapping[str, Any]) -> str:
    """How the module at `origin` writes a part or tensor of it."""
    below = path.removeprefix(f"{origin}.") if origin else path
    text = "self"
    at = modules[origin]
    for part in below.split("."):
        keyed = type(at).__name__ in ("ModuleDict", "ParameterDict")
        if part.isdigit():
            text += f"[{part}]"
        elif keyed:
            text += f"[{part!r}]"
        elif not part.isidentifier():
            text = f"getattr({text}, {part!r})"
        else:
            text += f".{part}"
        at = getattr(at, part, None)
    return text


def _is_below(path: str, origin: str) -> bool:
    return not origin or path.startswith(f"{origin}.")


def _leaves(tree: Any, text: str) -> Iterator[tuple[int, str]]:
    """The arrays of an argument, each with the text that reaches it."""
    if isinstance(tree, ValueRef):
        yield tree.value, text
    elif isinstance(tree, dict):
        for k, part in tree.items():
            yield from _leaves(part, f"{text}[{k!r}]")
    elif isinstance(tree, list):
        for k, part in enumerate(tree):
            yield from _leaves(part, f"{text}[{k}]")


def _tree_text(tree: Any, text: Callable[[int], str]) -> str:
    if isinstance(tree, ValueRef):
        return text(tree.value)
    if isinstance(tree, dict):
        return f"{{{', '.join(f'{k!r}: {_tree_text(x, text)}' for k, x in tree.items())}}}"
    if isinstance(tree, list):
        parts = [_tree_text(x, text) for x in tree]
        return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"
    return repr(tree) if isinstance(tree, bool | int | float | str) else "None"


def _permuted(text: str, axes: tuple[int, ...]) -> str:
    if axes == (1, 0):
        return f"{inside(text)}.T"
    return f"{inside(text)}.transpose({', '.join(map(str, axes))})"


__all__ = ["ArrayType", "Context", "NotRendered", "reached"]
