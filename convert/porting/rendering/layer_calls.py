"""Which calls are of layers that Flax has too, and which of sequences of parts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from convert.porting.rendering.constructor import LayerText
from convert.porting.rendering.layer_text import ImageAxes, layer_text, torch_class
from convert.porting.rendering.not_rendered import NotRendered
from convert.porting.rendering.renderers import computed
from convert.porting.rendering.scopes import Scope, Tree, children
from convert.porting.rules.elementwise import COPIES
from convert.program.graph import GraphNode, ValueRef, refs
from convert.program.nesting import LEAF, Nesting

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


# What normalises with running statistics, in eval mode.
_LAST = "last.batch_norm.default"
_NORMS = {"aten._native_batch_norm_legit_no_training.default", "aten.batch_norm.default", _LAST}


class LayerCalls:
    """The layers of a module, by path; `gone` are those that hand their argument on. `last`: those
    whose data has channels last."""

    def __init__(self, tree: Tree, last: Collection[str] = ()) -> None:
        self.tree, self.last = tree, frozenset(last)
        self.texts: dict[str, LayerText] = {}
        self._sequences: dict[str, bool] = {}
        self.derived = self._derived()
        for path, module in tree.modules.items():
            checked = path in self.derived
            layer = layer_text(module, self.axes(path), checked=checked) if path else None
            if layer is not None:
                self.texts[path] = layer
        self.norms = dict(self._norms())
        if last:
            self.texts |= dict.fromkeys(self._handed_on(), computed(lambda x: x))
        self.gone = {p for p in self.texts if self._is_gone(p)}

    def _derived(self) -> set[str]:
        """The modules of classes derived from a layer of torch's, of which every call is that
        layer's operation on its own tensors and nothing else."""
        found: dict[str, bool] = {}
        for scope in self.tree.root.scopes():
            nodes = [n for n in scope.nodes() if n.op not in COPIES]
            wanted = _OPERATIONS.get(_layer_class(scope.module), "")
            first = self.tree.first(scope.path)
            own = {f"{first}.{n}" for n, _ in scope.module.named_parameters(recurse=False)}
            held = [self.tree.placeholders.get(v) for n in nodes[:1] for v in self.tree.taken(n)]
            names = [p.name for p in held if p is not None and p.kind != "input"]
            good = len(nodes) == 1 and nodes[0].op == wanted and set(names) == own
            found[scope.path] = found.get(scope.path, True) and good
        return {path for path, good in found.items() if good}

    def axes(self, path: str) -> ImageAxes:
        """Where the data of a layer has its channels."""
        return "last" if path in self.last or self.tree.first(path) in self.last else "first"

    def _norms(self) -> Iterator[tuple[str, LayerText]]:
        """The modules whose classes derive from torch's BatchNorm and do something besides, by
        path: their own class derives from Flax's, and trains as that does."""
        calls: dict[str, list[Scope]] = {}
        for scope in self.tree.root.scopes():
            calls.setdefault(scope.path, []).append(scope)
        for path, scopes in calls.items():
            module = scopes[0].module
            known = path in self.texts or self.tree.first(path) != path
            if known or not _derives_from_norm(module):
                continue
            found = [[i for i in s.items if self.is_norm(s, i)] for s in scopes]
            ops = {item.op for items in found for item in items if isinstance(item, GraphNode)}
            if len(ops) == 1 and all(len(items) == 1 for items in found):
                axes: ImageAxes = "last" if ops == {_LAST} else "first"
                layer = layer_text(module, axes, checked=True)
                if layer is not None:
                    yield path, layer

    def is_norm(self, scope: Scope, item: GraphNode | Scope) -> bool:
        """Whether an operation is the normalisation that the class of this call derives from."""
        if isinstance(item, Scope) or item.op not in _NORMS or scope.function is not None:
            return False
        names = ("weight", "bias", "running_mean", "running_var")
        wanted = {f"{self.tree.first(scope.path)}.{n}" for n in names}
        held = [self.tree.placeholders.get(v) for v in self.tree.taken(item)[1:]]
        return {p.name for p in held if p is not None} == wanted and None not in held

    def _handed_on(self) -> set[str]:
        """The modules that only hand their array on: of a permutation nothing may be left."""
        found: dict[str, bool] = {}
        for scope in self.tree.root.scopes():
            copied = [n.op in COPIES for n in scope.nodes()]
            alone = len(scope.call.arguments) == len(scope.call.results) == 1 and scope.path
            holds = scope.module._modules or scope.module._parameters or scope.module._buffers
            good = bool(copied) and all(copied) and bool(alone) and not holds
            found[scope.path] = found.get(scope.path, True) and good
        return {path for path, good in found.items() if good and path not in self.texts}

    def exact(self) -> frozenset[str]:
        """The modules of torch's own layers that every call of is written as one: what they do in
        train mode, the written layer does too."""
        scopes = [s for s in self.tree.root.scopes() if s.path in self.texts]
        opened = {s.call.path for s in scopes if s.gives and not self.is_layer(s)}
        return frozenset(s.call.path for s in scopes if s.path not in self.derived) - opened

    def _is_gone(self, path: str) -> bool:
        """Whether a layer hands its argument on, and so do all in its place in other instances."""
        if self.texts[path].call("self", ["x"], {}) != "x" or self.texts[path].constructor:
            return False
        owner, _, name = path.rpartition(".")
        of = type(self.tree.modules[owner])
        return all(
            type(getattr(m, name, None)) is type(self.tree.modules[path])
            for m in self.tree.modules.values()
            if type(m) is of and hasattr(m, name)
        )

    def is_layer(self, scope: Scope) -> bool:
        """Whether a call is of a layer that Flax has too, with tensors of its own."""
        if scope.function is not None or scope.path not in self.texts or not scope.gives:
            return False
        if self.is_elsewhere(scope.path):
            return False
        nesting = scope.call.nesting
        passed = {r.value for r in scope.call.results if isinstance(r, ValueRef)}
        if nesting is None or not _is_tuples(nesting) or not passed.issuperset(scope.gives):
            return False
        given = [x for x in scope.call.arguments.values() if x is not None]
        if self.call_text(scope, "self", lambda tree: "x") is None:
            return False
        held = {v for n in scope.nodes() for v in self.tree.taken(n) if v in self.tree.placeholders}
        arrays = set(refs(given))
        return all(v in arrays or self.tree.own(v, scope.path) for v in held)

    def is_elsewhere(self, path: str) -> bool:
        """Whether the tensors of a layer are of a module that does not hold the one that has it
        here: they come as arguments."""
        first, owner = self.tree.first(path), path.rpartition(".")[0]
        while type(self.tree.modules[owner]).__module__ == "torch.nn.modules.container" and owner:
            owner = owner.rpartition(".")[0]
        tensors = [*self.tree.modules[path].parameters(), *self.tree.modules[path].buffers()]
        return bool(tensors) and not _is_below(first, self.tree.first(owner))

    def call_text(self, scope: Scope, target: str, text: Callable[[Any], str]) -> str | None:
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
        return self.texts[scope.path].call(target, args, kwargs)

    def repeats(self, scope: Scope) -> bool:
        """Whether the text of a layer holds its argument more than once."""
        if not self.is_layer(scope):
            return False
        given = [x for x in scope.call.arguments.values() if x is not None]
        names = [f"_{k}_" for k in range(len(given))]
        numbered = iter(names)
        text = self.call_text(scope, "self", lambda tree: next(numbered)) or ""
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
        names = [n for n, _ in children(module)]
        if type(module).forward is not torch.nn.Sequential.forward:
            return False
        numbered = names == [str(i) for i in range(len(names))]
        if not (numbered or is_named(module)) or module._parameters or module._buffers:
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
            if item.path in self.texts and not self.is_layer(item) and item.gives:
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
            if isinstance(item, Scope) and item.path in self.texts and not self.is_layer(item):
                yield from self.spliced(item)
            elif isinstance(item, Scope) and not self._is_inside(item, scope):
                raise NotRendered(f"{item.path} is called inside {scope.path}")
            else:
                yield item

    def _is_inside(self, item: Scope, scope: Scope) -> bool:
        return item.function is not None or _is_below(item.path, scope.path)


def _is_tuples(nesting: Nesting) -> bool:
    return nesting.kind in (LEAF, "tuple") and all(map(_is_tuples, nesting.parts))


def _derives_from_norm(module: Any) -> bool:
    """Whether a module's class derives from torch's BatchNorm, and is not it."""
    base = torch_class(module)
    return base not in (None, type(module)) and "BatchNorm" in getattr(base, "__name__", "")


def _layer_class(module: Any) -> str:
    return next((c.__name__ for c in type(module).__mro__ if c.__name__ in _OPERATIONS), "")


def _is_below(path: str, origin: str) -> bool:
    return not origin or path.startswith(f"{origin}.")


def is_named(module: Any) -> bool:
    """Whether the parts of a torch module have names, and no numbers for them."""
    return bool(module._modules) and not any(name.isdigit() for name in module._modules)
