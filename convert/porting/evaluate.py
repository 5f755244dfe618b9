"""A `Graph` evaluated in JAX: each operation by its rule, sizes by Python while JAX traces."""

from __future__ import annotations

import builtins
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from convert.program.graph import Graph, GraphNode, mapped
from convert.program.nesting import taken_apart
from convert.program.opaque import CALLS, OPERATION
from convert.runtime.arrays import is_array, replaced
from zoo.containers.errors import ZooError

Function = Callable[..., Any]

_SIZES: dict[str, Function] = {
    "aten.sym_size.int": lambda x, axis: x.shape[axis],
    "aten.sym_numel.default": lambda x: math.prod(x.shape),
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_float": float,
    "torch.sym_int": math.trunc,
    "torch.sym_not": operator.not_,
    "torch.sym_sum": sum,
    "torch.sym_ite": lambda condition, a, b: a if condition else b,
}
_PYTHON = {"operator": operator, "_operator": operator, "math": math, "builtins": builtins}
# What torch has and no rule can be for: shapes would depend on values.
_VALUES = {
    "aten.nonzero.default": "its size depends on the values",
    "aten.masked_select.default": "its size depends on the values",
    "aten._local_scalar_dense.default": "it takes a number out of a tensor (.item())",
    "aten.unique_consecutive.default": "its size depends on the values",
    "aten._unique2.default": "its size depends on the values",
}


class NoRule(ZooError):
    """Operations that the table does not have."""


class Evaluation:
    """A graph with the rule of each of its operations. `rules` are the user's, by operation.

    Raises NoRule, listing every operation without one.
    """

    def __init__(self, graph: Graph, rules: Mapping[str, Function]) -> None:
        self.graph = graph
        self.functions: dict[str, Function] = {}
        self.random: set[str] = set()
        missing: dict[str, list[GraphNode]] = {}
        for node in graph.nodes:
            if node.op in self.functions:
                continue
            found = function_of(node.op, rules)
            if found is None:
                missing.setdefault(node.op, []).append(node)
            else:
                self.functions[node.op] = found
                if _draws(found):
                    self.random.add(node.op)
        if missing:
            raise _no_rule(graph, missing)

    def run(
        self, values: Mapping[int, Any], key: Callable[[], Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The results and what is written into buffers, for the placeholders' values. `key` gives
        a fresh JAX key each time."""
        import jax

        held = dict(values)

        def dtype(d: Any) -> Any:
            return jax.dtypes.canonicalize_dtype(d.name)

        def given(x: Any) -> Any:
            return mapped(x, lambda ref: held[ref.value], dtype)

        for node in self.graph.nodes:
            kwargs = {k: given(v) for k, v in node.kwargs.items()}
            if node.op in self.random:
                kwargs["rng"] = key
            try:
                held[node.made] = self.functions[node.op](*map(given, node.args), **kwargs)
            except ZooError:
                raise
            except Exception as e:
                raise _failed(node, e) from e
        results = [given(r) for r in self.graph.results]
        return results, {n: given(r) for n, r in self.graph.mutations.items()}


def function_of(op: str, rules: Mapping[str, Function] = MappingProxyType({})) -> Any:
    """What an operation is: the user's rule, Python's on sizes, a call that stays whole, ours;
    None where there is nothing."""
    if op in rules:
        return rules[op]
    if op in _SIZES:
        return _SIZES[op]
    if op == OPERATION:
        return _called
    module, _, name = op.partition(".")
    if module in _PYTHON:
        return getattr(_PYTHON[module], name, None)
    from convert.porting.rules import find

    return find(op)


def _draws(function: Function) -> bool:
    """Whether a rule takes random keys."""
    stated = getattr(function, "random", None)
    if stated is not None:
        return bool(stated)
    try:
        return "rng" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


class _Layer:
    """What the rule of a module class sees: the module's tensors by name, its other attributes."""

    def __init__(self, of: Any, tensors: Mapping[str, Any]) -> None:
        self._of, self._tensors = of, tensors

    def __getattr__(self, name: str) -> Any:
        if name in self._tensors:
            return self._tensors[name]
        inside = {
            n.removeprefix(f"{name}."): x
            for n, x in self._tensors.items()
            if n.startswith(f"{name}.")
        }
        return _Layer(getattr(self._of, name), inside) if inside else getattr(self._of, name)


def _called(which: str, tensors: list[Any]) -> list[Any]:
    """A call that a user's rule stands for."""
    call = CALLS[which]
    whole = replaced(call.arguments, dict(zip(call.paths, tensors, strict=True)))
    args = whole["args"]
    if "of" in whole:
        args = (_Layer(whole["of"], whole["tensors"]), *args)
    made = call.rule(*args, **whole["kwargs"])
    _, found = taken_apart(made, "", lambda path, x: x)
    return [x for x in found if is_array(x)]


def _failed(node: GraphNode, e: Exception) -> ZooError:
    where = f" at {node.site}" if node.site else ""
    told = str(e).strip().splitlines()
    reason = told[0] if told else type(e).__name__
    if isinstance(e, NotImplementedError):
        return ZooError(
            f"{node.op} is not ported for these arguments: {reason}",
            f"give it a rule of your own: {_own_rule(node.op)}",
            [where.strip()] if where else [],
        )
    return ZooError(
        f"the rule of {node.op} failed: {type(e).__name__}: {reason}",
        f"mend the rule, or give another: {_own_rule(node.op)}",
        [where.strip()] if where else [],
    )


def _own_rule(op: str) -> str:
    return f"convert.porting.rules.rule({op!r}), or rules={{{op!r}: f}} of convert.to_flax"


def _no_rule(graph: Graph, missing: Mapping[str, list[GraphNode]]) -> NoRule:
    details = []
    for op, nodes in sorted(missing.items()):
        sites = dict.fromkeys(str(n.site) for n in nodes if n.site)
        where = next(iter(sites), f"in {nodes[0].module or 'the module'}")
        why = f" ({_VALUES[op]})" if op in _VALUES else ""
        details.append(f"{op}{why}: {where}")
    first = sorted(missing)[0]
    count = "an operation has" if len(missing) == 1 else f"{len(missing)} operations have"
    return NoRule(
        f"{count} no rule in JAX",
        f"write it, and register it with convert.porting.rules.rule({first!r}), or give it to "
        f"convert.to_flax alone by rules={{{first!r}: f}}: {_skeleton(first, graph.schemas)}",
        details,
    )


def _skeleton(op: str, schemas: Mapping[str, str]) -> str:
    name = op.split(".")[-2] if op.count(".") > 1 else op.rpartition(".")[2]
    return f"def {name}({schemas.get(op, '*args, **kwargs')}): ...  # on JAX arrays"
