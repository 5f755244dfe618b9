"""What a live module runs: its graphs (eval and train), its layout, and what was baked in.

It is no part of the module's state: one object for all copies of a module, never changed but for
the graph of train mode, which is made when it is first wanted.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from convert.porting.evaluate import Evaluation
from convert.porting.tensors_by_name import ByName
from convert.program.graph import Graph, ValueRef
from convert.program.nesting import taken_apart
from convert.program.opaque import Opaque
from convert.runtime.arrays import is_array, leaves
from zoo.containers.errors import UsageError, ZooError
from zoo.layout import Layout

Shapes = Mapping[str, tuple[int, ...]]
ImageAxes = Literal["first", "last"]


class DrawsRandom(UsageError):
    """A module that draws random numbers was given none."""


@dataclass
class Ported:
    """What is known of a port. `rows` are those of the proof (see `convert.judge`), by the sizes
    that were run; `baked` what other inputs cannot change; `notices` what to know besides."""

    verdict: Literal["same", "different", "not proved"] = "not proved"
    rows: dict[str, list[Any]] = field(default_factory=dict)
    baked: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines: list[str] = [self.verdict]
        for sizes, rows in self.rows.items():
            worst = max((r.ratio for r in rows), default=0.0)
            lines.append(f"  {sizes}: {len(rows)} values, at most {worst:.2g} of the noise")
        lines += [f"  baked in: {b}" for b in self.baked] + [f"  {n}" for n in self.notices]
        return "\n".join(lines)


class TorchProgram:
    """See the module's first lines. `trace` gives the graph of a mode (True: train)."""

    def __init__(
        self,
        name: str,
        signature: inspect.Signature,
        layout: Layout,
        trace: Callable[[bool, Shapes | None], Graph],
        rules: Mapping[str, Callable[..., Any]],
        image_axes: ImageAxes,
    ) -> None:
        self.name, self.signature, self.layout = name, signature, layout
        self.by_name = ByName(layout)
        self.trace, self.rules, self.image_axes = trace, rules, image_axes
        self.evaluations: dict[bool, Evaluation] = {}
        self.dtypes: dict[str, str] = {}  # of torch's tensors
        self.kept: dict[str, np.ndarray] = {}  # torch's tensors that Flax does not have
        self.frozen: frozenset[str] = frozenset()
        self.opaque: tuple[Opaque, ...] = ()
        self.others: list[TorchProgram] = []  # of sizes that the first graph is not for
        self.prove: Callable[[TorchProgram, Shapes], None] = lambda program, shapes: None
        self.run_once = False  # in a proof: compiling it costs more than running it
        self.report = Ported()

    @property
    def states_precision(self) -> bool:
        """Whether what is run says of so many bits what its graph does not."""
        return False

    def __deepcopy__(self, memo: Any) -> TorchProgram:
        return self

    def __repr__(self) -> str:
        return f"TorchProgram({self.name})"

    def evaluation(self, training: bool) -> Evaluation:
        """The graph of a mode, traced when it is first wanted."""
        if training not in self.evaluations:
            self.evaluations[training] = Evaluation(self.trace(training, None), self.rules)
        return self.evaluations[training]

    def twin(self, graph: Graph, training: bool = False) -> TorchProgram:
        """The same of another graph: of a copy in another precision, or of other sizes."""
        made = TorchProgram(
            self.name, self.signature, self.layout, self.trace, self.rules, self.image_axes
        )
        made.evaluations[training] = Evaluation(graph, self.rules)
        made.dtypes, made.kept, made.frozen = self.dtypes, self.kept, self.frozen
        made.opaque = self.opaque
        return made

    def paths(self) -> list[str]:
        """Where in the result of eval mode each array stands."""
        graph = self.evaluation(False).graph
        pairs = zip(graph.outputs.leaves(), graph.results, strict=True)
        return [p or "output" for p, r in pairs if isinstance(r, ValueRef)]

    def extra(self, graph: Graph) -> list[str]:
        """Tensors that are state although the layout has no place for them: buffers that the
        graph writes, parameters that no state_dict has."""
        wanted = [*graph.mutations, *(p.name for p in graph.of_kind("parameter"))]
        return [n for n in dict.fromkeys(wanted) if self.by_name.flax_of(n) is None]

    def fitting(
        self, training: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[TorchProgram, list[Any]]:
        """The program for the sizes of a call, traced anew where none is, and its arrays.

        UsageError where it is another call than the one that was traced, or torch does not run it.
        """
        graph = self.evaluation(training).graph
        arrays = self._arrays(graph, args, kwargs)
        names = [p.name for p in graph.of_kind("input")]
        shapes = {n: self._shape(x) for n, x in zip(names, arrays, strict=True)}
        for program in (self, *self.others):
            known = program.evaluations.get(training)
            if known is not None and not known.graph.misfits(shapes):
                return program, arrays
        return self._retraced(training, shapes, graph.misfits(shapes)), arrays

    def _retraced(self, training: bool, shapes: Shapes, why: list[str]) -> TorchProgram:
        """The program for sizes that no graph is for yet."""
        import jax

        try:
            graph = self.trace(training, shapes)
        except ZooError as e:
            raise UsageError(
                f"{self.name} was traced for another call, and not for this one either: "
                f"{e.problem}",
                "give inputs that torch's module runs on",
                [*why, *e.details],
            ) from e
        if still := graph.misfits(shapes):
            raise UsageError(f"{self.name} was traced for another call", "give other sizes", still)
        made = self.twin(graph, training)
        if not training:
            with jax.ensure_compile_time_eval():
                self.prove(made, shapes)
        self.others.append(made)
        return made

    def _arrays(self, graph: Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list:
        """The arrays of a call, in the order of the graph's inputs."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as e:
            raise UsageError(f"{self.name}: {e}", f"call it as {self.signature}") from None
        given = {n: x for n, x in bound.arguments.items() if not self._is_default(n, x)}
        arrays = leaves(given)
        wanted = [p.name for p in graph.of_kind("input")]
        told = [f"{n} was an array when it was traced" for n in wanted if n not in arrays]
        told += [f"{n} was no array when it was traced" for n in arrays if n not in wanted]
        for path, value in plain_values(given).items():
            if path not in graph.baked and path in arrays:
                continue
            if path not in graph.baked and value is not None:
                told.append(f"{path} is {value!r}, and was left out when it was traced")
            elif path in graph.baked and not _equal(graph.baked[path], value):
                told.append(f"{path} is {value!r}, and {graph.baked[path]!r} was baked in")
        for path, value in graph.baked.items():
            if path.partition(".")[0] not in bound.arguments and not self._is_default(path, value):
                told.append(f"{path} is left out, and {value!r} was baked in")
        if not told:
            told = [t for p in graph.of_kind("input") if (t := _unlike(p, arrays[p.name]))]
        if told:
            raise UsageError(
                f"{self.name} was traced for another call",
                "make one for this call with convert.to_flax(module, inputs)",
                told,
            )
        return [arrays[n] for n in wanted]

    def _shape(self, x: Any) -> tuple[int, ...]:
        shape = tuple(x.shape)
        return (shape[0], shape[-1], *shape[1:-1]) if self.is_image(x) else shape

    def is_image(self, x: Any) -> bool:
        """Whether an input or output of the module has its channels last."""
        return self.image_axes == "last" and x.ndim in (4, 5) and _kind(x.dtype) == "f"

    def _is_default(self, name: str, value: Any) -> bool:
        parameter = self.signature.parameters.get(name)
        if parameter is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return False
        return not is_array(value) and _equal(parameter.default, value)

    def run(
        self, training: bool, state: Mapping[str, Any], arrays: list, key: Any, inside: bool = False
    ) -> Any:
        """The results (a list) and the Flax tensors that the call changed, by name. `inside`: of
        what JAX traces, where no options of the compiler can be given."""
        graph = self.evaluation(training).graph
        constants = {n: x for n, x in graph.constants.items() if n not in state}
        compiled = self._compiled(training, self.run_once and not inside)
        return compiled(dict(state), constants, arrays, key)

    @functools.cached_property
    def _jitted(self) -> dict[tuple[bool, bool], Any]:
        return {}

    def _compiled(self, training: bool, once: bool) -> Any:
        import jax

        key = training, once
        if key not in self._jitted:
            options = {"xla_backend_optimization_level": 0} if once else None
            function = functools.partial(self._traced, training)
            self._jitted[key] = jax.jit(function, compiler_options=options)
        return self._jitted[key]

    def _traced(
        self, training: bool, state: dict[str, Any], constants: dict, arrays: list, key: Any
    ) -> tuple[list[Any], dict[str, Any]]:
        import jax
        import jax.numpy as jnp

        evaluation = self.evaluation(training)
        graph = evaluation.graph
        held = [p.name for p in graph.of_kind("parameter", "buffer")]
        tensors = self.by_name.torch(held, state)
        values: dict[int, Any] = {}
        inputs = iter(arrays)
        for p in graph.placeholders:
            if p.kind == "input":
                x = jnp.asarray(next(inputs))
                values[p.value] = jnp.moveaxis(x, -1, 1) if self.is_image(x) else x
            elif p.name in tensors:
                values[p.value] = tensors[p.name]
            else:
                found = state.get(p.name, constants.get(p.name, self.kept.get(p.name)))
                values[p.value] = jnp.asarray(found)
            if p.name in self.frozen:
                values[p.value] = jax.lax.stop_gradient(values[p.value])
        counter = iter(range(2**31))

        def fresh() -> Any:
            if key is None:
                raise DrawsRandom(
                    f"{self.name} draws random numbers, and has none to draw from",
                    "call train() first, or give rngs=nnx.Rngs(seed)",
                )
            return jax.random.fold_in(key, next(counter))

        results, written = evaluation.run(values, fresh)
        results = [
            x for r, x in zip(graph.results, results, strict=True) if isinstance(r, ValueRef)
        ]
        results = [jnp.moveaxis(jnp.asarray(x), 1, -1) if _image(self, x) else x for x in results]
        extra = {n: x for n, x in written.items() if self.by_name.flax_of(n) is None}
        inside = {self.by_name.owner(n): x for n, x in written.items() if n not in extra}
        return results, self.by_name.flax(inside) | extra


def _image(program: TorchProgram, x: Any) -> bool:
    return is_array(x) and program.is_image(x)


def plain_values(tree: Any) -> dict[str, Any]:
    """What of arguments is no array: path -> value."""
    nesting, found = taken_apart(dict(tree), "", lambda _, x: x)
    return {p: x for p, x in zip(nesting.leaves(), found, strict=True) if not is_array(x)}


def _equal(a: Any, b: Any) -> bool:
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # whatever a stranger's class does when it is compared
        return a is b


def _kind(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    if name == "bool":
        return "b"
    return "c" if "complex" in name else "f" if "float" in name else "i"


def _unlike(p: Any, x: Any) -> str:
    """Why an array cannot stand for the one that was traced; "" if it can."""
    if len(p.shape) != x.ndim:
        return f"{p.name} has {x.ndim} axes, and was traced with {len(p.shape)}"
    words = {"f": "floating-point numbers", "i": "integers", "b": "booleans", "c": "complex"}
    wanted, held = _kind(p.dtype), _kind(x.dtype)
    if wanted == held:
        return ""
    return f"{p.name} holds {words[held]}, and was traced of {words[wanted]}"


def plain_result(graph: Graph, results: list[Any]) -> Any:
    """What torch's module returns, of the arrays among it."""
    arrays = iter(results)
    return graph.outputs.built(
        next(arrays) if isinstance(r, ValueRef) else r for r in graph.results
    )
