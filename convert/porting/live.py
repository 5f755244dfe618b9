"""A torch module that runs in JAX: an nnx.Module with its parameters under the layout's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.porting.program_of import TorchProgram, plain_result
from convert.program.graph import Graph
from convert.tensors import info_of, to_torch
from zoo.checkpoint.label import Carried
from zoo.containers.errors import UsageError

_OWN = ("deterministic", "rngs", "_program")


class Buffer(nnx.Variable):
    """A torch buffer that is neither a parameter nor a running statistic."""


class Part(nnx.Module):
    """A submodule: parameters, statistics and parts, by torch's names."""


class LiveModule(nnx.Module):
    """A torch module, live in JAX; `convert.to_flax` makes it.

    It is called as torch's is and returns what torch's does, a dataclass as a NamedTuple of its
    fields. Parameters are nnx.Params and running statistics nnx.BatchStats, named and oriented as
    `layout` says; `train()` and `eval()` are torch's. Random numbers come from `rngs`, the call's
    or its own, which it has once it is in train mode. `report` is what was proved.
    """

    def __init__(self, program: TorchProgram, values: Mapping[str, tuple[type, Any]]) -> None:
        self._program = program
        self.deterministic = True
        tops = {name.partition(".")[0] for name in values}
        if taken := sorted(tops & set(_OWN)):
            raise UsageError(
                f"{program.name} has parts called {', '.join(taken)}, which the live module needs",
                "rename them in the torch module",
            )
        for name, part in _nested(values).items():
            setattr(self, name, part)

    def __getattr__(self, name: str) -> Any:
        """`report` and `layout`, unless torch's module has parts of these names."""
        if name in ("report", "layout") and "_program" in vars(self):
            return getattr(vars(self)["_program"], name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        program = self._program
        rngs = None if "rngs" in program.signature.parameters else kwargs.pop("rngs", None)
        training = not self.deterministic
        program, arrays = program.fitting(training, args, kwargs)
        evaluation = program.evaluation(training)
        self._take_in(evaluation.graph)
        key = self._key(rngs) if evaluation.random else None
        variables = self._variables()
        state = {n: v.get_value() for n, v in variables.items()}
        results, written = program.run(training, state, arrays, key)
        for name, value in written.items():
            variables[name].set_value(value)
        return plain_result(evaluation.graph, results)

    def train(self, **attributes: Any) -> None:
        """torch's train mode: dropout drops, statistics are updated."""
        evaluation = self._program.evaluation(True)
        self._take_in(evaluation.graph)
        if evaluation.random and not hasattr(self, "rngs"):
            self.rngs = nnx.Rngs(0)
        super().train(**attributes)  # type: ignore[no-untyped-call]

    def _key(self, rngs: Any) -> Any:
        """A fresh key; None where there is nothing to draw from, which what draws will say."""
        rngs = getattr(self, "rngs", None) if rngs is None else rngs
        return None if rngs is None else rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs()

    def _variables(self) -> dict[str, nnx.Variable]:
        """Every parameter, statistic and buffer by its name in the layout."""
        own = nnx.to_flat_state(nnx.state(self, nnx.Not(nnx.RngState)))
        return {".".join(map(str, path)): self._at(path) for path, _ in own}

    def _at(self, path: tuple[Any, ...]) -> Any:
        found: Any = self
        for part in path:
            found = found[part] if isinstance(found, nnx.List) else getattr(found, str(part))
        return found

    def _take_in(self, graph: Graph) -> None:
        """Buffers that this graph writes and that the layout has no place for, as variables."""
        for name in self._program.extra(graph):
            holder: Any = self
            *path, leaf = name.split(".")
            for part in path:
                if isinstance(holder, nnx.List):
                    holder = holder[int(part)]
                    continue
                if not hasattr(holder, part):
                    setattr(holder, part, Part())
                holder = getattr(holder, part)
            if not hasattr(holder, leaf):
                setattr(holder, leaf, Buffer(placed(name, self._program.kept[name])))


def torch_state(net: LiveModule) -> dict[str, Any]:
    """See `convert.to_state_dict`."""
    program = net._program
    held = {n: np.asarray(v.get_value()) for n, v in net._variables().items()}
    by_name = program.by_name
    made: dict[str, Any] = {}
    found = by_name.torch([n for n in program.dtypes if by_name.flax_of(n) is not None], held)
    for name, dtype in program.dtypes.items():
        owner = by_name.owner(name)
        if owner in made:
            made[name] = made[owner]
            continue
        value = found.get(name, held.get(name, program.kept.get(name)))
        made[name] = to_torch(np.array(np.asarray(value).astype(dtype, copy=False), order="C"))
    return made


def carried(net: LiveModule) -> dict[str, Carried]:
    """The tensors that only torch has (counters), as a checkpoint keeps them beside its tree."""
    program = net._program
    variables = net._variables()
    made = {}
    for entry in program.layout.entries:
        name = entry.torch[0].name
        if entry.constant is not None and name in program.dtypes:
            held = variables[name].get_value() if name in variables else program.kept[name]
            value = np.array(np.asarray(held).astype(program.dtypes[name]))
            made[name] = Carried(info_of(name, value), value.tobytes())
    return made


def placed(name: str, array: np.ndarray) -> Any:
    """An array as JAX's; integers that JAX would cut stay NumPy's. UsageError for floats that it
    would cut."""
    wide = jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype
    if wide and array.dtype.kind in "fc":
        raise UsageError(
            f"{name} is {array.dtype.name}, which JAX would cut to 32 bits",
            "set jax_enable_x64, or give module.float()",
        )
    return array if wide else jnp.asarray(array)


def _nested(values: Mapping[str, tuple[type, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, made in values.items():
        *path, leaf = name.split(".")
        there = tree
        for part in path:
            there = there.setdefault(part, {})
        there[leaf] = made
    return {name: _part(below) for name, below in tree.items()}


def _part(tree: Any) -> Any:
    if not isinstance(tree, dict):
        kind, value = tree
        return kind(value)
    parts = {name: _part(below) for name, below in tree.items()}
    if all(name.isdigit() and str(int(name)) == name for name in parts):
        return nnx.List([parts.get(str(i), Part()) for i in range(1 + max(map(int, parts)))])
    made = Part()
    for name, part in parts.items():
        setattr(made, name, part)
    return made
