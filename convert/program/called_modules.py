"""Which modules are called while a graph is made, which functions in the code of their packages,
and the values that each takes and gives.

Hooks see the modules; the names of functions mean others for a while. What they see are tensors
without values, of which the graph keeps what is returned: so each call leaves a number and copies
of its tensors among the results, and `read` finds the values in the finished graph that were copied
there. A module that hands its argument on gives a copy, so that it is seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from convert.program.called_functions import functions_seen
from convert.program.graph import GraphNode, ValueRef
from convert.program.nesting import Nesting, taken_apart
from convert.runtime.arrays import is_array

_NUMBER = "aten.full.default"
_COPY = "aten.clone.default"


@dataclass(eq=False)
class ModuleCall:
    """One call. `path` is the module's ("" for the root), or that of the module in whose call
    `function` was called; `arguments` are those of its forward by name, `arguments` and `results`
    with a ValueRef for each array, their nesting beside them. Nodes with numbers between `begin`
    and `end` ran in it."""

    path: str
    arguments: dict[str, Any]
    begin: int = -1
    end: int = -1
    nesting: Nesting | None = None  # of the result
    signature: tuple[str, ...] = ()  # the parameters of forward
    function: Any = None
    results: list[Any] = field(default_factory=list)
    given: list[Any] = field(default_factory=list)  # the tensors, while they are traced


class CalledModules:
    """The calls of `root` and its parts. `marks` are to be among what the exported function
    returns."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self.marks: list[Any] = []
        self.calls: list[ModuleCall] = []

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        """While it lasts, calls are noted, from nothing."""
        self.marks.clear()
        self.calls.clear()
        running: list[ModuleCall] = []

        def before(path: str) -> Any:
            def hook(module: Any, args: Any, kwargs: Any) -> None:
                running.append(self._begun(path, module.forward, args, kwargs))

            return hook

        def after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            call = running.pop()
            if passed_on := is_array(output) and any(output is x for x in call.given):
                output = output.clone()
            self._ended(call, output)
            return output if passed_on else None

        def instead(function: FunctionType) -> Callable[..., Any]:
            def called(*args: Any, **kwargs: Any) -> Any:
                if not running or not _has_plain_arrays((args, kwargs)):
                    return function(*args, **kwargs)
                running.append(self._begun(running[-1].path, function, args, kwargs))
                running[-1].function = function
                try:
                    output = function(*args, **kwargs)
                finally:
                    call = running.pop()
                if _has_plain_arrays(output):
                    self._ended(call, output)
                return output

            return called

        handles = []
        for path, part in self.root.named_modules():
            handles += [
                # before other hooks, which may compute the weights (spectral_norm)
                part.register_forward_pre_hook(before(path), prepend=True, with_kwargs=True),
                part.register_forward_hook(after, with_kwargs=True),
            ]
        try:
            with functions_seen(self.root, instead):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _begun(self, path: str, function: Any, args: Any, kwargs: Any) -> ModuleCall:
        signature = inspect.signature(function)
        call = ModuleCall(path, self._bound(signature, args, kwargs))
        call.given = [x for x in (*args, *kwargs.values()) if is_array(x)]
        call.signature = tuple(signature.parameters)
        self.calls.append(call)
        call.begin = self._mark()
        call.arguments = {n: self._copied(x) for n, x in call.arguments.items()}
        return call

    def _ended(self, call: ModuleCall, output: Any) -> None:
        call.nesting, leaves = taken_apart(output, "", lambda _, x: x)
        call.results = [self._copied(x) for x in leaves]
        call.end = self._mark()

    def _bound(self, signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
        try:
            found = dict(signature.bind(*args, **kwargs).arguments)
        except TypeError:  # a forward that a decorator has changed
            return {f"arg{i}": x for i, x in enumerate(args)} | dict(kwargs)
        for p in signature.parameters.values():
            if p.kind is p.VAR_KEYWORD:
                found |= found.pop(p.name, {})
        return found

    def _mark(self) -> int:
        import torch

        number = len(self.marks)
        self.marks.append(torch.full((), number))
        return number

    def _copied(self, tree: Any) -> Any:
        """The tree with the number of a mark, as a ValueRef, for each array."""
        if is_array(tree):
            self.marks.append(tree.clone())
            return ValueRef(len(self.marks) - 1)
        if isinstance(tree, Mapping) and not hasattr(tree, "_asdict"):
            return {k: self._copied(x) for k, x in tree.items()}
        if isinstance(tree, tuple | list):
            return [self._copied(x) for x in tree]
        return tree

    def read(self, marks: list[Any], nodes: Mapping[int, GraphNode]) -> list[ModuleCall]:
        """The calls with the values of the graph in place of the numbers of marks. `marks` is what
        the graph returns for them; `nodes` are all its nodes by what they make."""

        def value(number: int) -> Any:
            found = marks[number]
            node = nodes.get(found.value) if isinstance(found, ValueRef) else None
            return node.args[0] if node is not None and node.op == _COPY else found

        def placed(tree: Any) -> Any:
            if isinstance(tree, ValueRef):
                return value(tree.value)
            if isinstance(tree, dict):
                return {k: placed(x) for k, x in tree.items()}
            return [placed(x) for x in tree] if isinstance(tree, list) else tree

        return [
            dataclasses.replace(
                call,
                arguments={n: placed(x) for n, x in call.arguments.items()},
                begin=marks[call.begin].value,
                end=marks[call.end].value,
                results=[placed(x) for x in call.results],
                given=[],
            )
            for call in self.calls
            if call.end >= 0
        ]


def _has_plain_arrays(tree: Any) -> bool:
    """Whether there are tensors in it, and none that stands for several under a vmap: copies of
    those cannot leave it."""
    import torch

    found = [x for x in torch.utils._pytree.tree_leaves(tree) if is_array(x)]
    return bool(found) and not any(map(torch._C._functorch.is_batchedtensor, found))
