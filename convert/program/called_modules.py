"""Which modules are called while a graph is made, and the values that each takes and gives.

Hooks see every call. What they see are tensors without values, of which the graph keeps what is
returned: so each call leaves a number and copies of its tensors among the results, and `read` finds
the values in the finished graph that were copied there. A module that hands its argument on gives a
copy, so that it is seen.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from convert.program.graph import GraphNode, ValueRef
from convert.program.nesting import Nesting, taken_apart
from convert.runtime.arrays import is_array

_NUMBER = "aten.full.default"
_COPY = "aten.clone.default"


@dataclass(eq=False)
class ModuleCall:
    """One call. `path` is the module's ("" for the root); `arguments` are those of its forward by
    name, `arguments` and `result` with a ValueRef for each array, their nesting beside them. Nodes
    with numbers between `begin` and `end` ran in it."""

    path: str
    arguments: dict[str, Any]
    begin: int = -1
    end: int = -1
    nesting: Nesting | None = None  # of the result
    signature: tuple[str, ...] = ()  # the parameters of forward
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
                call = ModuleCall(path, self._bound(module, args, kwargs))
                call.given = [x for x in (*args, *kwargs.values()) if is_array(x)]
                call.signature = tuple(inspect.signature(module.forward).parameters)
                self.calls.append(call)
                running.append(call)
                call.begin = self._mark()
                call.arguments = {n: self._copied(x) for n, x in call.arguments.items()}

            return hook

        def after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            call = running.pop()
            call.nesting, leaves = taken_apart(output, "", lambda _, x: x)
            if passed_on := is_array(output) and any(output is x for x in call.given):
                output = output.clone()
                leaves = [output]
            call.results = [self._copied(x) for x in leaves]
            call.end = self._mark()
            return output if passed_on else None

        handles = []
        for path, part in self.root.named_modules():
            handles += [
                part.register_forward_pre_hook(before(path), with_kwargs=True),
                part.register_forward_hook(after, with_kwargs=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _bound(self, module: Any, args: Any, kwargs: Any) -> dict[str, Any]:
        signature = inspect.signature(module.forward)
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
            ModuleCall(
                call.path,
                {n: placed(x) for n, x in call.arguments.items()},
                marks[call.begin].value,
                marks[call.end].value,
                call.nesting,
                call.signature,
                [placed(x) for x in call.results],
            )
            for call in self.calls
            if call.end >= 0
        ]
