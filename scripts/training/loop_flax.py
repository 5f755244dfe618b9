"""The Flax side of a run: a model, an optax transformation, one compiled step."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, serialization
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert.runtime.arrays import named_outputs
from training import checkpoints
from training.description import Batch, Job, Term
from training.optimizers import optax_transformation, set_rate
from zoo.containers.errors import UsageError
from zoo.model import Model


class Trainer:
    """One job in Flax. With several devices each computes its part of every batch."""

    framework = "flax"
    rank, world = 0, 1

    def __init__(self, job: Job) -> None:
        self.job = job
        if job.devices > jax.local_device_count():
            raise UsageError(
                f"{job.devices} devices asked for, JAX has {jax.local_device_count()}",
                "on a CPU: XLA_FLAGS=--xla_force_host_platform_device_count=N",
            )
        if job.batch_size % job.devices:
            raise UsageError(
                f"a batch of {job.batch_size} cannot be divided among {job.devices}",
                f"give a --batch-size that is a multiple of {job.devices}",
            )
        self.mesh = Mesh(np.array(jax.local_devices()[: job.devices]), ("data",))
        compute = job.dtype if job.dtype == "bfloat16" else None
        with self._precision():
            self._take(checkpoints.create(job, dtype=compute))

    def _take(self, module: Any) -> None:
        job = self.job
        module.train()
        self.module = module
        self.graph, self.params, self.rest = nnx.split(module, nnx.Param, ...)
        module.eval()
        self.eval_graph = nnx.split(module, nnx.Param, ...)[0]
        self.tx = optax_transformation(job.optimizer, job.rate, job.schedule != "constant")
        self.state = self.tx.init(self.params)
        whole = NamedSharding(self.mesh, PartitionSpec())
        if job.devices > 1:
            held = self.params, self.rest, self.state
            self.params, self.rest, self.state = jax.device_put(held, whole)
        self._step = jax.jit(partial(_step, self.graph, self.tx, job.task.terms))
        self._predict = jax.jit(partial(_predict, self.eval_graph))

    def step(self, batch: Batch, rate: float) -> float:
        """One update; the loss before it."""
        with self._precision():
            set_rate(self.state, rate)
            given = self._inputs(batch), self._targets(batch)
            loss, self.params, self.rest, self.state = self._step(
                self.params, self.rest, self.state, *given
            )
            return float(loss)

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Outputs in eval mode, by name and in PyTorch's order of axes, float64."""
        with self._precision():
            inputs = flax_inputs(self.job.model, batch.inputs, self.job.param_dtype)
            output = self._predict(self.params, self.rest, inputs)
            return numpy_outputs(self.job.model, output)

    def save(self, path: Path, step: int) -> None:
        """A msgpack file: the model's tree, the optimizer's, and what else is known."""
        state = {
            "model": plain(nnx.merge_state(self.params, self._kept())),
            "opt_state": serialization.to_state_dict(plain(self.state)),
            **checkpoints.facts(self.job, step),
        }
        data = serialization.msgpack_serialize(jax.tree.map(host, state))
        checkpoints.write(path, lambda file: file.write(data), self.job)

    def resume(self, path: Path) -> int:
        """Take up the weights, the optimizer and the step of either framework's checkpoint."""
        step = checkpoints.check(path, self.job)
        with self._precision():
            self._take(checkpoints.load(path, self.job))
            self.state = checkpoints.fill(path, self.tx, self.module, self.job.rate_at(step), step)
        return step

    def weights(self) -> dict[str, np.ndarray]:
        """Canonical tensors."""
        flat = nnx.to_flat_state(nnx.merge_state(self.params, self._kept()))
        values = {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in flat}
        return checkpoints.canonical(self.job, values)

    def wait(self) -> None:
        """One process has nobody to wait for."""

    def close(self) -> None:
        """Nothing to leave."""

    def _kept(self) -> Any:
        """The running statistics: what is a weight without being trained."""
        return nnx.filter_state(self.rest, nnx.BatchStat)

    @contextlib.contextmanager
    def _precision(self) -> Any:
        with jax.enable_x64(self.job.dtype == "float64"):
            yield

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        found = flax_inputs(self.job.model, batch.inputs, self.job.param_dtype)
        return self._placed(found, batch.axis)

    def _targets(self, batch: Batch) -> dict[str, tuple[Any, Any]]:
        at = batch.target_axis
        targets = self._placed(
            {k: narrow(v, self.job.param_dtype) for k, v in batch.targets.items()}, at
        )
        weights = {k: narrow(batch.weight(k), self.job.param_dtype) for k in batch.targets}
        weights = self._placed(weights, at)
        return {k: (targets[k], weights[k]) for k in targets}

    def _placed(self, arrays: dict[str, np.ndarray], axis: int) -> dict[str, Any]:
        if self.job.devices == 1:
            return arrays
        spec = PartitionSpec(*[None] * axis, "data")
        return {k: jax.device_put(v, NamedSharding(self.mesh, spec)) for k, v in arrays.items()}


def _step(
    graph: Any, tx: Any, terms: tuple[Term, ...], params: Any, rest: Any, state: Any,
    inputs: dict[str, Any], targets: dict[str, tuple[Any, Any]],
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    def loss_of(params: Any) -> tuple[Any, Any]:
        # Copied: running statistics change, and belong to this trace.
        module = nnx.merge(graph, params, rest, copy=True)
        output = module(**inputs)
        dtype = jax.tree.leaves(params)[0].dtype
        loss = sum(_term(term, output, targets, dtype) for term in terms)
        return loss, nnx.split(module, nnx.Param, ...)[2]

    (loss, after), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, state = tx.update(grads, state, params)
    return loss, optax.apply_updates(params, updates), after, state


def _predict(graph: Any, params: Any, rest: Any, inputs: dict[str, Any]) -> Any:
    return nnx.merge(graph, params, rest)(**inputs)


def _term(term: Term, output: Any, targets: dict[str, tuple[Any, Any]], dtype: Any) -> Any:
    """One term of a loss; 0 where the batch has no such target."""
    found = getattr(output, term.output) if term.output else output
    if term.kind == "value":
        return term.scale * found.astype(dtype)
    if term.target not in targets:
        return 0.0
    target, weight = targets[term.target]
    return term.scale * (elements(term.kind, found.astype(dtype), target) * weight).sum()


def elements(kind: str, found: Any, target: Any) -> Any:
    """The loss of every element."""
    if kind == "cross_entropy":
        log = jax.nn.log_softmax(found, -1)
        return -jnp.take_along_axis(log, target[..., None], -1)[..., 0]
    target = target.astype(found.dtype)
    if kind == "mse":
        return (found - target) ** 2
    if kind == "bce":  # torch's bound on the logarithms
        log, log_not = (jnp.maximum(jnp.log(p), -100) for p in (found, 1 - found))
        return -(target * log + (1 - target) * log_not)
    return jnp.maximum(found, 0) - found * target + jnp.log1p(jnp.exp(-jnp.abs(found)))


def narrow(array: np.ndarray, dtype: str) -> np.ndarray:
    """Floats in `dtype`; integers in 32 bits, which JAX has in every mode."""
    if array.dtype.kind == "f":
        return array.astype(dtype)
    return array.astype(np.int32) if array.dtype.kind in "iu" else array


def flax_inputs(
    model: Model, inputs: Mapping[str, np.ndarray], dtype: str
) -> dict[str, np.ndarray]:
    """Inputs in Flax's order of axes."""
    return {k: narrow(model.to_flax(k, v), dtype) for k, v in inputs.items()}


def numpy_outputs(model: Model, output: Any) -> dict[str, np.ndarray]:
    """Outputs by name, float64, in PyTorch's order of axes."""
    found = named_outputs(output)
    return {k: model.from_flax(k, np.asarray(v, np.float64)) for k, v in found.items()}


def plain(tree: Any) -> Any:
    """Every NNX state in a tree as nested dicts with string keys."""
    is_state = lambda x: isinstance(x, nnx.State)  # noqa: E731
    return jax.tree.map(
        lambda x: _strings(nnx.to_pure_dict(x)) if is_state(x) else x, tree, is_leaf=is_state
    )


def _strings(tree: Any) -> Any:
    return {str(k): _strings(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def host(leaf: Any) -> Any:
    """A NumPy array of a jax.Array; anything else as it is."""
    return np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf


def evaluator(model: Model, module: Any, dtype: str) -> Any:
    """inputs -> outputs of a loaded module, by name; compiled once a shape."""
    graph, state = nnx.split(module)
    call = jax.jit(lambda state, inputs: nnx.merge(graph, state)(**inputs))
    return lambda inputs: numpy_outputs(model, call(state, flax_inputs(model, inputs, dtype)))
