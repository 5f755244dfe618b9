"""A port's source, imported, in the place of its graph: to be proved alike."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import linecache
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from convert.porting.fixed_draws import KNOWN, jax_draws
from convert.porting.image_axes.moved import Relaid
from convert.porting.program_of import DrawsRandom, TorchProgram
from convert.porting.rendering.module_file import ModuleFile
from convert.program.graph import Graph
from convert.program.nesting import taken_apart
from convert.runtime.arrays import is_array, nested
from zoo.containers.errors import ZooError

_NUMBERS = itertools.count()


class Imported:
    """The file of a port, imported under a name of its own; the file is gone then."""

    def __init__(self, file: ModuleFile) -> None:
        self.source, self.draws = file.source, file.draws
        name = f"_zooconvert_port_{next(_NUMBERS)}"
        with tempfile.TemporaryDirectory(prefix="zooconvert-port-") as folder:
            path = Path(folder) / f"{name}.py"
            path.write_text(file.source)
            if file.arrays:
                np.savez(path.with_suffix(".npz"), **file.arrays)  # type: ignore[arg-type]
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            self.module = importlib.util.module_from_spec(spec)
            sys.modules[name] = self.module  # where dataclasses and the like look for it
            spec.loader.exec_module(self.module)
            linecache.getlines(str(path))
        del sys.modules[name]
        self.model = getattr(self.module, file.model)

    def net(self) -> Any:
        """The model, with fresh weights, in eval mode."""
        from flax import nnx

        net = self.model(rngs=nnx.Rngs(0))
        net.eval()
        return net


class SourceProgram(TorchProgram):
    """A program that runs what was written, and not its graph."""

    def __init__(
        self,
        program: TorchProgram,
        imported: Imported,
        render: Callable[[Graph], ModuleFile],
        moved: Relaid,
    ) -> None:
        vars(self).update(vars(program))
        vars(self).pop("_jitted", None)
        self.imported, self.render, self.moved = imported, render, moved
        self.run_once = True

    @property
    def states_precision(self) -> bool:
        """See TorchProgram: a source states the dtype of what it makes."""
        return "float32" in self.imported.source

    def twin(self, graph: Graph, training: bool = False) -> TorchProgram:
        """See TorchProgram.twin. A graph that states its precision is written anew: its source
        differs in dtypes alone."""
        own = graph is self.evaluation(False).graph
        imported = self.imported if own else Imported(self.render(graph))
        return SourceProgram(super().twin(graph, training), imported, self.render, self.moved)

    def _traced(
        self, training: bool, state: dict[str, Any], constants: dict, arrays: list, key: Any
    ) -> tuple[list[Any], dict[str, Any]]:
        net = self.imported.net()
        fill(net, self.moved.state(state | constants, self.layout))
        found = [p.name for p in self.evaluation(training).graph.of_kind("input")]
        call = nested(self.moved.given(dict(zip(found, arrays, strict=True))))
        if others := self.imported.draws - KNOWN:
            raise DrawsRandom(f"{self.name} draws by {', '.join(others)}", "give it the numbers")
        try:
            with _exact_attention(), jax_draws():
                result = net(**call)
        except ZooError:
            raise
        except Exception as e:  # whatever JAX says of source that is not right
            told = str(e).strip().splitlines() or [""]
            raise ZooError(
                f"the source that was written does not run: {type(e).__name__}: {told[0][:200]}",
                "report this; convert.to_flax gives the model as a live module",
                [_line_of(e)],
            ) from e
        _, leaves = taken_apart(result, "", lambda _, x: x)
        return self.moved.back(self.paths(), [x for x in leaves if is_array(x)]), {}


@contextlib.contextmanager
def _exact_attention() -> Iterator[None]:
    """jax.nn.dot_product_attention with its softmax in the precision of its arguments: JAX's own
    is float32's in float64 too."""
    import jax
    import jax.numpy as jnp

    original = jax.nn.dot_product_attention

    def attention(query: Any, key: Any, value: Any, **options: Any) -> Any:
        plain = set(options) <= {"scale", "is_causal"} and query.ndim == 4
        if query.dtype != jnp.float64 or not plain or query.shape[2] != key.shape[2]:
            return original(query, key, value, **options)
        scale = options.get("scale") or query.shape[-1] ** -0.5
        logits = jnp.einsum("btnh,bsnh->bnts", query, key) * scale
        if options.get("is_causal"):
            seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
            logits = jnp.where(seen, logits, -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits, axis=-1), value)

    with mock.patch.object(jax.nn, "dot_product_attention", attention):
        yield


def _line_of(e: Exception) -> str:
    """The line of the port that an error comes from."""
    found = [f for f in traceback.extract_tb(e.__traceback__) if "_zooconvert_port_" in f.filename]
    return f"line {found[-1].lineno}: {found[-1].line}" if found else "in the layers that it uses"


def fill(net: Any, state: Mapping[str, Any]) -> None:
    """Give a port's variables the arrays of their names. ZooError where one has none, or another
    shape; constants that are not given stay."""
    from flax import nnx

    wrong = []
    for path, variable in nnx.to_flat_state(nnx.state(net, nnx.Not(nnx.RngState))):
        name = ".".join(map(str, path))
        if name not in state:
            if type(variable).__name__ != "Constant":
                wrong.append(f"{name} has no tensor in the layout")
            continue
        if tuple(variable.get_value().shape) != tuple(state[name].shape):
            wrong.append(f"{name} is {variable.get_value().shape}, not {state[name].shape}")
            continue
        _variable(net, path).set_value(state[name])
    for _, part in nnx.iter_modules(net):
        if isinstance(part, nnx.Embed):  # which has taken the dtype of what it was made with
            part.dtype = part.embedding.get_value().dtype
    if wrong:
        raise ZooError("the port holds other tensors than its layout", "report this", wrong)


def _variable(net: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        net = (
            net[part]
            if isinstance(part, int) or not hasattr(net, str(part))
            else getattr(net, str(part))
        )
    return net
