"""A graph as a tree: each call of a module, or of a function in its code, with the operations and
the calls inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from convert.porting.rendering.source_lines import code_lines, forward_lines
from convert.program.called_modules import ModuleCall
from convert.program.graph import ArrayType, CodeLine, Graph, GraphNode, Placeholder, ValueRef, refs
from convert.program.nesting import LEAF


@dataclass(eq=False)
class Scope:
    """One call of a module; or of a function, then `path` and `module` are what it is called by.
    `depth` is the frame of its code among those of its nodes; `takes` are the values from outside
    that are used in it, `gives` those made in it and used outside."""

    path: str
    module: Any
    call: ModuleCall
    items: list[GraphNode | Scope] = field(default_factory=list)
    depth: int = 0
    takes: list[int] = field(default_factory=list)
    gives: list[int] = field(default_factory=list)

    @property
    def function(self) -> Any:
        """The function whose call this is; None of a module's."""
        return self.call.function

    @property
    def is_model(self) -> bool:
        """Whether this is the call of the model itself."""
        return not self.path and self.function is None

    def lines(self) -> tuple[str, int, int]:
        """The file of its code, and the first and last line there; ("", 0, 0) if unknown."""
        return forward_lines(self.module) if self.function is None else code_lines(self.function)

    def part_of(self, value: int) -> tuple[int, int] | None:
        """Which part of what is returned a value is, and of how many; None of what is nested
        otherwise."""
        results, nesting = self.call.results, self.call.nesting
        if nesting is None or nesting.kind == LEAF:
            return None
        counts = [sum(1 for _ in part.leaves()) for part in nesting.parts]
        places = [k for k, count in enumerate(counts) for _ in range(count)]
        wanted = ValueRef(value)
        if wanted not in results or len(places) != len(results):
            return None
        return places[results.index(wanted)], len(counts)

    def nodes(self) -> Iterator[GraphNode]:
        """Every operation in it, at any depth, in order."""
        for item in self.items:
            if isinstance(item, Scope):
                yield from item.nodes()
            else:
                yield item

    def every(self) -> Iterator[Scope]:
        """It and every call inside it, outermost first."""
        yield self
        for item in self.items:
            if isinstance(item, Scope):
                yield from item.every()

    def scopes(self) -> Iterator[Scope]:
        """Those of modules."""
        return (s for s in self.every() if s.function is None)

    def functions(self) -> Iterator[Scope]:
        """Those of functions."""
        return (s for s in self.every() if s.function is not None)

    def open(self, function: Any) -> None:
        """Put the operations of every call of a function in the place of the call."""
        opened: list[GraphNode | Scope] = []
        for item in self.items:
            if not isinstance(item, Scope):
                opened.append(item)
                continue
            item.open(function)
            opened += item.items if item.function is function else [item]
        self.items = opened

    def place(self, of: GraphNode | Scope) -> tuple[CodeLine, ...]:
        """Where in this call's own code an item stands: the lines from forward inwards."""
        first = next(of.nodes(), None) if isinstance(of, Scope) else of
        if first is None:
            return ()
        last = of.depth if isinstance(of, Scope) and of.depth > self.depth else None
        return first.frames[self.depth : last]


class Tree:
    """The scopes of a graph of `module`, whose calls were noted. `home` gives the name that one of
    its tensors has in Flax; `orders` say of a value which of torch's axes stands where, if not as
    in torch."""

    def __init__(
        self,
        graph: Graph,
        module: Any,
        home: Callable[[str], str],
        orders: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.graph, self.home, self.orders = graph, home, orders or {}
        self.placeholders: dict[int, Placeholder] = {p.value: p for p in graph.placeholders}
        self.modules: dict[str, Any] = dict(module.named_modules(remove_duplicate=False))
        self._firsts: dict[int, str] = {}  # of modules, see `first`
        self.names: dict[int, list[str]] = {}  # every path of a module, the first one first
        for path, part in self.modules.items():
            self.names.setdefault(id(part), []).append(path)
        self.nodes = [n for n in graph.nodes if self.is_array(n.made)]
        calls = iter(sorted(graph.calls, key=lambda c: (c.begin, -c.end)))
        self.root = Scope("", module, next(calls))
        self._fill(self.root, list(calls))
        self._depths(self.root, 0)
        self._borders()
        self._leave_out_idle(self.root)
        while odd := next(filter(self._is_odd, self.root.functions()), None):
            self.root.open(odd.function)

    def first(self, path: str) -> str:
        """The first path of the module at a path: the one that its tensors have. What has none,
        and is nobody's layer, is another at each of its paths."""
        module = self.modules[path]
        if id(module) not in self._firsts:
            held = any(True for _ in (*module.parameters(), *module.buffers()))
            shared = held or type(module).__module__.startswith("torch.nn.")
            self._firsts[id(module)] = self.names[id(module)][0] if shared else ""
        return self._firsts[id(module)] or path

    def path_below(self, path: str, owner: str) -> str:
        """The path of a module that lies below another's, if it has one."""
        names = self.names[id(self.modules[path])]
        below = [n for n in names if not owner or n.startswith(f"{owner}.")]
        return path if path in below or not below else below[0]

    def is_array(self, value: int) -> bool:
        """Whether a value is an array, or a list of them; sizes are not."""
        return isinstance(self.graph.types.get(value), ArrayType | list)

    def type_of(self, value: int) -> Any:
        """See `Graph.types`."""
        return self.graph.types[value]

    def _fill(self, root: Scope, calls: list[ModuleCall]) -> None:
        running = [root]
        events: list[tuple[int, int, Any]] = [(n.made, 1, n) for n in self.nodes]
        events += [(c.begin, 0, c) for c in calls]
        for number, _, event in sorted(events, key=lambda e: e[:2]):
            while len(running) > 1 and running[-1].call.end < number:
                running.pop()
            if isinstance(event, ModuleCall):
                path = self.path_below(event.path, running[-1].path)
                path = running[-1].path if event.function is not None else path
                made = Scope(path, self.modules[event.path], event)
                running[-1].items.append(made)
                running.append(made)
            else:
                running[-1].items.append(event)

    def _depths(self, scope: Scope, start: int) -> None:
        scope.depth = start
        first = next(scope.nodes(), None)
        if first is not None:
            file, low, high = scope.lines()
            for i, frame in enumerate(first.frames[start:], start):
                if frame.file == file and low <= frame.line <= high:
                    scope.depth = i
                    break
        for item in scope.items:
            if isinstance(item, Scope):
                self._depths(item, scope.depth + 1)

    def taken(self, item: GraphNode | Scope) -> list[int]:
        """The arrays that an item takes, each as often as it is mentioned."""
        if isinstance(item, Scope):
            return item.takes
        return [v for v in refs((item.args, dict(item.kwargs))) if self.is_array(v)]

    def own(self, value: int, path: str) -> bool:
        """Whether a value is a tensor that the module at a path holds, or a part of it does."""
        p = self.placeholders.get(value)
        if p is None or p.kind == "input":
            return False
        if p.kind == "constant" or not path:
            return True
        return self.home(p.name).startswith(f"{self.first(path)}.")

    def _held(self, value: int, scope: Scope) -> bool:
        """Whether the code of a call reaches a tensor without being given it."""
        if scope.function is None:
            return self.own(value, scope.path)
        p = self.placeholders.get(value)
        return p is not None and p.kind == "constant"

    def _is_odd(self, scope: Scope) -> bool:
        """Whether the call of a function cannot be one in the port: it has nothing in it, calls
        modules, takes more than it is given, or changes more than it returns."""
        inside = [i for i in scope.items if isinstance(i, Scope)]
        given = set(refs(list(scope.call.arguments.values())))
        returned = {r.value for r in scope.call.results if isinstance(r, ValueRef)}
        first = next(scope.nodes(), None)
        file, low, high = scope.lines()
        frame = first.frames[scope.depth : scope.depth + 1] if first is not None else ()
        return (
            sum(1 for _ in scope.nodes()) < 2
            or any(s.function is None for s in inside)
            or not given.issuperset(scope.takes)
            or not returned.issuperset(scope.gives)
            or not scope.gives
            or not any(f.file == file and low <= f.line <= high for f in frame)
        )

    def _leave_out_idle(self, scope: Scope) -> None:
        """Leave out the calls that give nothing that is used: the port has none of them."""
        scope.items = [i for i in scope.items if not isinstance(i, Scope) or i.gives]
        for item in scope.items:
            if isinstance(item, Scope):
                self._leave_out_idle(item)

    def _borders(self) -> None:
        """`takes` and `gives` of every scope."""
        users: dict[int, list[int]] = {}  # value -> the operations that take it, by what they make
        for node in self.nodes:
            for value in self.taken(node):
                users.setdefault(value, []).append(node.made)
        results = set(refs((self.graph.results, self.graph.mutations)))
        for scope in self.root.every():
            made = [n.made for n in scope.nodes()]
            inside = set(made)
            taken = dict.fromkeys(v for n in scope.nodes() for v in self.taken(n))
            if scope.is_model:  # what it is given, and does nothing with
                taken |= dict.fromkeys(p.value for p in self.graph.of_kind("input"))
            scope.takes = [v for v in taken if v not in inside and not self._held(v, scope)]
            scope.gives = [
                v for v in made if v in results or any(u not in inside for u in users.get(v, ()))
            ]
            passed = [r.value for r in scope.call.results if isinstance(r, ValueRef)]
            order = {v: i for i, v in reversed(list(enumerate(passed)))}
            scope.gives.sort(key=lambda v: (order.get(v, len(passed)), v))


def children(module: Any) -> list[tuple[str, Any]]:
    """The parts of a torch module under all their names: torch's own function leaves out a part
    that is there twice."""
    return [(name, part) for name, part in module._modules.items() if part is not None]
