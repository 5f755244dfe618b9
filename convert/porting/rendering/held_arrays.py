"""The tensors that a module holds: how they are read, and how they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.porting.rendering.argument_text import permuted, reached
from convert.porting.rendering.constants import array_text
from convert.porting.rendering.constructor import Constructor, Name
from convert.porting.rendering.inits import MadeText, MadeVariable, Stored
from convert.porting.rendering.not_rendered import NotRendered
from convert.porting.rendering.scopes import Scope, Tree
from convert.porting.tensors_by_name import ByName
from convert.tensors import bits_of
from zoo.layout.ops import Concat, Flip, Permute, inverse


class HeldArrays:
    """The parameters, buffers and constants of a module. `arrays` are those that the source cannot
    say, which are kept beside it; `kinds` the variables that are not Flax's own. `turned` are the
    orders of axes of those that are not as in torch."""

    def __init__(
        self, tree: Tree, by_name: ByName, module: Any, turned: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.tree, self.by_name, self.turned = tree, by_name, turned
        self.tensors = dict(module.named_parameters(remove_duplicate=False))
        self.trained = set(self.tensors)
        self.tensors |= dict(module.named_buffers(remove_duplicate=False))
        self.tensors |= {n: self.tensors[n].permute(o) for n, o in turned.items()}
        self.arrays: dict[str, np.ndarray] = {}
        self.kinds: dict[str, None] = {}

    def held_text(self, scope: Scope, value: int) -> str:
        """A tensor that the module at a path holds, in the axes that the graph has it in."""
        p = self.tree.placeholders[value]
        if p.kind == "constant":
            array = self.tree.graph.constants[p.name]
            return f"jnp.asarray({array_text(array) or self._stored(p.name, array)})"
        entry = self.by_name.flax_of(p.name)
        origin = self.tree.first(scope.path)
        if entry is None:
            return f"{reached(origin, p.name, self.tree.modules)}[...]"
        arrays = [f"{reached(origin, t.name, self.tree.modules)}[...]" for t in entry.flax]
        if len(entry.torch) > 1:
            raise NotRendered(f"{p.name} is one of several tensors of one in Flax")
        if p.name in self.turned:
            return arrays[0]
        for op in inverse(entry.ops, [t.shape for t in entry.torch]):
            if isinstance(op, Permute):
                arrays = [permuted(a, op.axes) for a in arrays]
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
            array = bits_of(tensor)
            said = array_text(array)
            return MadeVariable(kind, MadeText(said) if said else self._stored(home, array))
        tensor = tensor.detach()
        if not tensor.numel():  # of no registers, say
            return MadeVariable(kind, Constructor("jnp.zeros", (shape,)))
        low, high = float(tensor.min()), float(tensor.max())
        if low == high and low in (0.0, 1.0):
            return MadeVariable(kind, Constructor("jnp.ones" if low else "jnp.zeros", (shape,)))
        if low == high:
            return MadeVariable(kind, Constructor("jnp.full", (shape, float(f"{low:.7g}"))))
        callee = _initializer(float(tensor.float().std(correction=0)), shape)
        return MadeVariable(kind, Constructor(callee, (Name("rngs.params()"), shape)))

    def _stored(self, home: str, array: np.ndarray) -> Stored:
        """Where an array is kept, which the source cannot say."""
        for name, held in self.arrays.items():
            if held.dtype == array.dtype and np.array_equal(held, array):
                return Stored(name)
        self.arrays[home] = array
        return Stored(home)


def _initializer(spread: float, shape: tuple[int, ...]) -> str:
    """What draws numbers of about this deviation: by fan in or out where that explains it."""
    usual = next((s for s in _USUAL if abs(spread / s - 1) < 0.1), None)
    if usual is None and len(shape) > 1 and math.prod(shape) > _FEW:
        fan_in, fan_out = math.prod(shape[:-1]), shape[-1] * math.prod(shape[:-2])
        scaled = {
            "lecun_normal": fan_in,
            "he_normal": fan_in / 2,
            "xavier_normal": (fan_in + fan_out) / 2,
        }
        for name, fan in scaled.items():
            if abs(spread * math.sqrt(fan) - 1) < 0.1:
                return f"nnx.initializers.{name}()"
    return f"nnx.initializers.normal({usual or float(f'{spread:.1g}') or 1.0})"


_USUAL = (0.02, 0.01, 1.0)
_FEW = 100  # numbers whose deviation says little
