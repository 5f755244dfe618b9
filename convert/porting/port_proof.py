"""A live module beside its torch module: outputs at the traced sizes and at others, gradients.

float32 is judged by torch's own rounding, and float64 by a graph of its own, of a copy in float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from inspect import BoundArguments
from typing import Any

import numpy as np

from convert.judge.noise import Noise, judge, within
from convert.judge.rows import Row
from convert.porting.fixed_draws import torch_draws
from convert.porting.program_of import DrawsRandom, Ported, TorchProgram
from convert.porting.rules.promote import defaulting
from convert.porting.tensors_by_name import ByName
from convert.program.calls import buffers_kept, fresh, in_precision, resized, runs
from convert.program.export import traced_graph, traces_otherwise
from convert.program.graph import Graph, Guard, evaluate, states_precision
from convert.program.nesting import taken_apart
from convert.runtime.arrays import is_inexact, leaves, to_numpy
from convert.runtime.call import Call
from convert.runtime.precision import jax_precision, precision_of, torch_as_written
from convert.runtime.torch_module import narrow_operation, replica, shake
from convert.tensors import bits_of
from zoo.containers.errors import NotEquivalent, ZooError

Arrays = dict[str, np.ndarray]
_PLAIN = re.compile(r"\w+ (>=|<=|<|>|==|!=) \w+")  # others are torch's own bookkeeping
_STEPS = (1, 2, 3, 4, 7, 8, 16, 32, -1, -2)  # how far an untraced size is from the traced one


@dataclasses.dataclass
class LivePair:
    """A torch module in eval mode and its program."""

    module: Any
    program: TorchProgram


def prove(
    pair: LivePair,
    traced: BoundArguments,
    calls: Sequence[BoundArguments],
    gradients: bool,
    others: bool = True,
) -> Ported:
    """What is shown of the program: rows by sizes; at `others` too, than those of `calls`.
    NotEquivalent where anything differs."""
    program = pair.program
    evaluation = program.evaluation(False)
    graph, report = evaluation.graph, program.report
    report.notices += [*graph.notices, *([graph.closed] if graph.closed else [])]
    exact = _Exact(pair, traced)
    if exact.refused:
        report.notices.append(f"torch's module does not run in float64: {exact.refused}")
    wanted = {_sizes(call): call for call in (*calls, traced)}
    if others and (other := _other_sizes(pair, traced)) is not None:
        wanted.setdefault(_sizes(other), other)
    elif others and graph.symbols:
        report.notices.append("torch runs at no other size that was tried")
    try:
        for sizes, call in wanted.items():
            report.rows[sizes] = exact.rows(call, gradients)
    except DrawsRandom:
        report.notices.append("it draws random numbers in eval mode: its outputs are not compared")
        report.baked = list(dict.fromkeys(_baked(graph)))
        return report
    if others:
        _ones(pair, traced, exact, report)
    report.baked = list(dict.fromkeys(_baked(graph)))
    if wrong := [(s, r) for s, rows in report.rows.items() for r in rows if not r.same]:
        report.verdict = "different"
        told = [
            f"{s}: {r.name} {r.shape}: {r.ratio:.3g} of the noise, {r.error64:.3g} apart in "
            f"float64 (scale {r.scale:.3g})"
            for s, r in wrong[:8]
        ]
        why = (
            "torch.export traces another computation than the module runs: some of its code asks "
            "whether it is traced"
            if traces_otherwise(pair.module, traced)
            else "a rule is wrong, ours or yours"
        )
        raise NotEquivalent(
            f"{program.name}: the port gives other values than torch in {len(wrong)} of "
            f"{sum(map(len, report.rows.values()))} outputs and gradients",
            f"nothing was given back, as {why}; verify=False gives the module as it is, to look at",
            [*told, *graph.notices],
        )
    report.verdict = "same"
    return report


class _Exact:
    """The module in its own precision and in float64, in both frameworks."""

    def __init__(self, pair: LivePair, traced: BoundArguments) -> None:
        self.pair, self.program = pair, pair.program
        held = [t for t in pair.module.parameters() if t.is_floating_point()]
        self.own = str(held[0].dtype).removeprefix("torch.") if held else "float32"
        self.module64 = replica(pair.module, "float64")
        self.narrow = self.refused = ""
        with precision_of("float64"), torch_as_written():
            call = in_precision(traced, "float64")
            try:
                runs(self.module64, call)
            except ZooError as e:  # torch._grouped_mm and others refuse float64
                self.refused = e.problem
                return
            self.narrow = narrow_operation(self.module64, Call(call.args, call.kwargs)) or ""
        graph = self.program.evaluation(False).graph
        if (
            states_precision(graph) or self.program.states_precision
        ):  # what was baked in as float32 is float64 there
            with precision_of("float64"):
                calls = bool(graph.calls)
                graph = traced_graph(self.module64, call, self.program.opaque, graph.opened, calls)
        with defaulting("float64"):
            self.program64 = self.program.twin(graph)
        self.program64.run_once = True

    def rows(self, call: BoundArguments, gradients: bool) -> list[Row]:
        """One row for each output, and for each gradient where they are wanted."""
        run = _torch_gradients if gradients else _torch_outputs
        live = _live_gradients if gradients else _live_outputs
        wide = self.own == "float64"
        with precision_of("float64" if wide else "float32"), torch_as_written():
            rough = run(self.pair.module, call, self.program.paths())
        with jax_precision("float64" if wide else "float32"):
            ours = live(self.program, self.pair.module, call)
        exact: Arrays = {}
        if not self.refused:
            with precision_of("float64"), torch_as_written():
                exact = run(self.module64, in_precision(call, "float64"), self.program.paths())
        ours64: Arrays = {}
        if not self.refused:
            with jax_precision("float64"), defaulting("float64"):
                ours64 = live(self.program64, self.module64, in_precision(call, "float64"))
        if rough.keys() != ours.keys():
            raise AssertionError(f"{list(rough)} and {list(ours)}")  # both follow one nesting
        noise = Noise(
            exact or rough,
            lambda precision, i: self._again(call, precision, i, run),
            exact64=True,
        )
        made = []
        for n in rough:
            row = noise.again(judge(n, (rough[n], exact.get(n)), (ours[n], ours64.get(n))))
            if self.narrow and not row.same:
                note = f"{self.narrow}, in float64 too"
                narrow = judge(n, (rough[n], exact.get(n)), (ours[n], None))
                near = within(row.error64, narrow.noise, narrow.scale)
                same = narrow.same and near
                row = dataclasses.replace(narrow, error64=row.error64, note=note, same=same)
            made.append(row)
        return made

    def _again(self, call: BoundArguments, precision: str, seed: int, run: Any) -> Arrays:
        with precision_of(precision), torch_as_written():
            moved = replica(self.pair.module, precision)
            shake(moved, seed)
            found: Arrays = run(moved, in_precision(call, precision), self.program.paths())
            return found


def _named(made: Any, paths: Sequence[str]) -> dict[str, Any]:
    """What stands at these paths of torch's result."""
    nesting, found = taken_apart(made, "", lambda path, x: x)
    pairs = {p or "output": x for p, x in zip(nesting.leaves(), found, strict=True)}
    return {p: pairs[p] for p in paths}


def _torch_outputs(module: Any, call: BoundArguments, paths: Sequence[str]) -> Arrays:
    with torch_draws():
        return {n: to_numpy(x) for n, x in _named(runs(module, call), paths).items()}


def flax_state(module: Any, by_name: ByName) -> dict[str, Any]:
    """Flax's tensors of a torch module's values, by name, and what the layout has no place for."""
    every = dict(module.named_buffers(remove_duplicate=False))
    every |= dict(module.named_parameters(remove_duplicate=False))
    arrays = {n: bits_of(t) for n, t in every.items()}
    inside = {n: x for n, x in arrays.items() if by_name.flax_of(n) is not None}
    return by_name.flax(inside) | {n: x for n, x in arrays.items() if n not in inside}


def _inputs(program: TorchProgram, call: BoundArguments) -> list[np.ndarray]:
    found = leaves(call.arguments)
    inputs = program.evaluation(False).graph.of_kind("input")
    arrays = [bits_of(found[p.name]) for p in inputs]
    return [np.moveaxis(x, 1, -1) if program.is_image(x) else x for x in arrays]


def _live_outputs(program: TorchProgram, module: Any, call: BoundArguments) -> Arrays:
    state = flax_state(module, program.by_name)
    results, _ = program.run(False, state, _inputs(program, call), None)
    return _by_name(program, results)


def _by_name(program: TorchProgram, results: list[Any]) -> dict[str, Any]:
    made = {}
    for name, value in zip(program.paths(), results, strict=True):
        x = to_numpy(value)
        made[name] = np.moveaxis(x, -1, 1) if program.is_image(x) else x
    return made


def _cotangents(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Weights of a loss, one for each number that a floating-point output holds."""
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal(x.shape) for n, x in arrays.items() if is_inexact(x)}


def _torch_gradients(module: Any, call: BoundArguments, paths: Sequence[str]) -> Arrays:
    """The outputs, and the gradient of each parameter for the loss of `_cotangents`."""
    import torch

    held = {n: p for n, p in module.named_parameters() if p.requires_grad}
    with torch.enable_grad(), buffers_kept(module):
        own = fresh(call)
        outputs = _named(module(*own.args, **own.kwargs), paths)
        weights = _cotangents(outputs)
        loss = sum(
            (x * torch.as_tensor(weights[n]).to(x)).sum().real
            for n, x in outputs.items()
            if n in weights and x.requires_grad
        )
        given: list[Any] = [None] * len(held)
        if isinstance(loss, torch.Tensor) and held:
            given = list(torch.autograd.grad(loss, list(held.values()), allow_unused=True))
    made = {n: to_numpy(x) for n, x in outputs.items()}
    for (name, p), g in zip(held.items(), given, strict=True):
        made[f"gradient of {name}"] = to_numpy(torch.zeros_like(p) if g is None else g)
    return made


def _live_gradients(program: TorchProgram, module: Any, call: BoundArguments) -> Arrays:
    import jax
    import jax.numpy as jnp

    state, arrays = flax_state(module, program.by_name), _inputs(program, call)
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    flax = {t.name for n in names if (e := program.by_name.flax_of(n)) for t in e.flax}
    moved = {n: jnp.asarray(x) for n, x in state.items() if n in flax or n in names}

    def loss(changed: dict[str, Any]) -> Any:
        results, _ = program.run(False, state | changed, arrays, None, inside=True)
        outputs = dict(zip(program.paths(), results, strict=True))
        apart = {
            n: jnp.moveaxis(x, -1, 1) if program.is_image(x) else x for n, x in outputs.items()
        }
        weights = _cotangents(apart)
        parts = [jnp.sum(apart[n] * w.astype(apart[n].dtype)).real for n, w in weights.items()]
        return sum(parts, jnp.zeros(())), results

    gradients, results = jax.grad(loss, has_aux=True)(moved)
    made = _by_name(program, results)
    inside = program.by_name.torch([n for n in names if program.by_name.flax_of(n)], gradients)
    for n in names:
        made[f"gradient of {n}"] = to_numpy(inside[n] if n in inside else gradients[n])
    return made


def _sizes(call: BoundArguments) -> str:
    return ", ".join(f"{n} {tuple(x.shape)}" for n, x in leaves(call.arguments).items())


def _with_sizes(graph: Graph, call: BoundArguments, sizes: Mapping[str, int]) -> BoundArguments:
    """The call with these sizes for the graph's symbols."""
    wanted = {
        p.name: {a: int(evaluate(s, sizes)) for a, s in enumerate(p.shape) if isinstance(s, str)}
        for p in graph.of_kind("input")
    }
    return resized(call, wanted)


def _tried(pair: LivePair, call: BoundArguments, sizes: Mapping[str, int]) -> BoundArguments | None:
    """The call at these sizes, if the graph is for them and torch runs it."""
    graph = pair.program.evaluation(False).graph
    made = _with_sizes(graph, call, sizes)
    shapes = {n: tuple(x.shape) for n, x in leaves(made.arguments).items()}
    if graph.misfits(shapes):
        return None
    try:
        runs(pair.module, made)
    except ZooError:
        return None
    return made


def _traced_sizes(graph: Graph, call: BoundArguments) -> dict[str, int]:
    return graph.sizes({n: tuple(x.shape) for n, x in leaves(call.arguments).items()})


def _other_sizes(pair: LivePair, call: BoundArguments) -> BoundArguments | None:
    """The call with as many sizes as possible other than they were traced: those that were alike
    are moved alike, where torch runs that, and others not."""
    graph = pair.program.evaluation(False).graph
    sizes, found = _traced_sizes(graph, call), None
    alike: dict[int, list[str]] = {}
    for symbol, size in sizes.items():
        alike.setdefault(size, []).append(symbol)
    groups = list(alike.values())
    while groups:
        group = groups.pop(0)
        shift = len(alike) - len(groups)
        for step in (*_STEPS[shift % 3 :], *_STEPS[: shift % 3]):
            changed = sizes | {s: max(sizes[s] + step, 2) for s in group}
            if changed != sizes and (made := _tried(pair, call, changed)) is not None:
                sizes, found = changed, made
                break
        else:
            groups += [[s] for s in group] if len(group) > 1 else []
    return found


def _ones(pair: LivePair, call: BoundArguments, exact: _Exact, report: Ported) -> None:
    """Sizes of 1, which torch.export takes for impossible: the graph is for them where that is
    shown."""
    graph = pair.program.evaluation(False).graph
    traced = _traced_sizes(graph, call)
    for symbols in (list(traced), *([s] for s in traced)):
        before = list(graph.guards)
        freed = {f"{s} >= 2": Guard(f"{s} >= 1") for s in symbols}
        graph.guards[:] = [freed.get(g.condition, g) for g in before]
        made = _tried(pair, call, traced | dict.fromkeys(symbols, 1))
        rows = []
        with contextlib.suppress(ZooError):
            rows = [] if made is None else exact.rows(made, False)
        if made is None or not rows or not all(r.same for r in rows):
            graph.guards[:] = before
            continue
        report.rows.setdefault(_sizes(made), rows)
        if len(symbols) == len(traced):
            return


def _baked(graph: Graph) -> Iterator[str]:
    """What every call must have in common with the traced one, in words."""
    for p in graph.of_kind("input"):
        fixed = [f"axis {a} is {s}" for a, s in enumerate(p.shape) if isinstance(s, int)]
        if fixed:
            yield f"{p.name}: {', '.join(fixed)}"
    for path, value in graph.baked.items():
        yield f"{path}: {value!r}"
    told = " ".join(g.condition for g in graph.guards if g.site)
    for guard in graph.guards:
        known = guard.condition.split()[0] in told or guard.condition[-4:] in (">= 1", ">= 2")
        if guard.site or (not known and _PLAIN.fullmatch(guard.condition)):
            where = f" ({guard.site})" if guard.site else ""
            yield f"{graph.worded(guard.condition)}{where}"
