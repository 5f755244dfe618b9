"""A graph whose images have channels last, and what lies otherwise than in torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from convert.porting.image_axes.orders import Order, in_order, last, plain, turn
from convert.program.graph import Graph
from zoo.layout import Layout, Tensor
from zoo.layout.ops import Permute


@dataclass(frozen=True)
class Relaid:
    """`orders` are those of the values that lie in another order than torch's; `layers` the modules
    whose data has channels last; `inputs`, `outputs` and `tensors` (parameters, buffers, constants)
    what of the module's own lies otherwise, by path and name; `reasons` say of each transpose that
    the source has not why it is there."""

    graph: Graph
    orders: Mapping[int, Order] = field(default_factory=dict)
    layers: frozenset[str] = frozenset()
    inputs: Mapping[str, Order] = field(default_factory=dict)
    outputs: Mapping[str, Order] = field(default_factory=dict)
    tensors: Mapping[str, Order] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)

    def layout(self, layout: Layout) -> Layout:
        """The layout of the port: its tensors in their order."""
        entries = []
        for entry in layout.entries:
            order = self.tensors.get(entry.torch[0].name)
            if order is not None:
                (held,) = entry.flax
                shape = tuple(in_order(held.shape, order))
                entry = dataclasses.replace(
                    entry, flax=(Tensor(held.name, shape),), ops=(*entry.ops, Permute(order))
                )
            entries.append(entry)
        return Layout(entries, layout.dialects) if self.tensors else layout

    def state(self, state: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
        """Arrays by name, those that the layout has no place for in their order."""
        inside = {t.name for e in layout.entries for t in e.flax}
        return {
            n: x.transpose(self.tensors[n]) if n in self.tensors and n not in inside else x
            for n, x in state.items()
        }

    def given(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of torch's module by path, as the port takes them."""

        def placed(x: Any, order: Order) -> Any:
            return x.permute(order) if hasattr(x, "permute") else x.transpose(order)

        return {n: placed(x, self.inputs[n]) if n in self.inputs else x for n, x in arrays.items()}

    def back(self, paths: Sequence[str], arrays: Sequence[Any]) -> list[Any]:
        """What the port gives, at these paths, in torch's axes."""
        orders = [self.outputs.get("" if p == "output" else p) for p in paths]
        return [
            x if o is None else x.transpose(turn(o, plain(len(o))))
            for x, o in zip(arrays, orders, strict=True)
        ]

    def told(self) -> list[str]:
        """What to know of the inputs and outputs, in words."""
        return [
            f"{path or 'the output'} is {_shape(order, order)}, where torch's is "
            f"{_shape(order, plain(len(order)))}"
            for path, order in (*self.inputs.items(), *self.outputs.items())
        ]


_AXES = {3: "BCT", 4: "BCHW", 5: "BCDHW"}


def _shape(image: Order, order: Order) -> str:
    """The axes of an image, as they lie in an order; `image` says which are its channels."""
    n = len(image)
    letters = _AXES.get(n, "")
    if image == (0, 1, 3, 4, 2):
        letters = "BTCHW"
    elif image != last(n) or not letters:
        letters = "IJKLMNOP"
    return f"({', '.join(letters[a] for a in order)})"
