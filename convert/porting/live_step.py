"""A training step of torch code, live: the model, the optimizer, and the step over both."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from inspect import BoundArguments
from typing import Any

from flax import nnx

from convert.judge.noise import judge
from convert.porting.live import LiveModule, torch_state
from convert.porting.torch_optimizer import transformation
from convert.porting.training_step import Step, clipped
from convert.program.calls import in_precision, with_tensors
from convert.runtime.arrays import dtype_in, is_inexact, to_numpy
from convert.tensors import bits_of
from convert.training_state.into_live import load_optimizer
from convert.training_state.torch_state import from_torch
from zoo.containers.errors import NotEquivalent, UsageError

PROVED = 3  # steps: the second is the first that a momentum moves


class LiveStep(nnx.Module):
    """One training step: called as torch's function is, it trains `net` by `optimizer` and returns
    what torch's returns.

    `net` is the live function of (the loss, what it returns); the model is below it by the name
    that the function has for it. `optimizer` is an nnx.Optimizer with torch's rule, rates and
    state. Both are updated in place: under `nnx.jit` the step is an argument.
    """

    def __init__(self, net: LiveModule, optimizer: nnx.Optimizer[Any], step: Step) -> None:
        self.net, self.optimizer = net, optimizer
        self._clips = tuple(step.clips)

    @property
    def report(self) -> Any:
        """What was proved of the loss, and of the step."""
        return self.net.report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def loss(net: LiveModule) -> Any:
            return net(*args, **kwargs)

        gradients, result = nnx.grad(loss, has_aux=True)(self.net)
        self.optimizer.update(self.net, clipped(gradients, self._clips))
        return result


def live_step(net: LiveModule, module: Any, step: Step) -> LiveStep:
    """The step of a live function that was recorded as one, with torch's optimizer as it stands."""
    tx = transformation(step.optimizer, _groups(net, module, step))
    made = LiveStep(net, nnx.Optimizer(net, tx, wrt=nnx.Param), step)
    if step.optimizer.state:
        state = from_torch(step.optimizer, model=module)
        load_optimizer(state, made.optimizer, net, layout=net.layout)
    return made


def _groups(net: LiveModule, module: Any, step: Step) -> dict[str, int | None]:
    """Which of the optimizer's groups trains each Flax parameter."""
    of = {id(p): i for i, g in enumerate(step.optimizer.param_groups) for p in g["params"]}
    own = {n: of.get(id(p)) for n, p in module.named_parameters(remove_duplicate=False)}
    params = nnx.to_flat_state(nnx.state(net, nnx.Param))
    found: dict[str, int | None] = {}
    for name in (".".join(map(str, path)) for path, _ in params):
        entry = next(e for e in net.layout.entries if name in {t.name for t in e.flax})
        groups = {own.get(t.name) for t in entry.torch}
        if len(groups) > 1:
            raise UsageError(
                f"{', '.join(t.name for t in entry.torch)} are one tensor in Flax and in several "
                "groups of the optimizer",
                "give them one group",
            )
        found[name] = groups.pop()
    if missing := set(of) - {id(p) for p in module.parameters()}:
        raise UsageError(
            f"the optimizer trains {len(missing)} parameters of modules that {step.name} "
            "does not mention",
            "give a step and an optimizer of the same modules",
        )
    return found


def prove_step(made: LiveStep, module: Any, step: Step, call: BoundArguments) -> None:
    """Hold a few steps against torch's own: what they return, and the state that they leave. What
    draws random numbers is stepped in eval mode.

    Raises NotEquivalent. Neither side is changed.
    """
    training = step.trains and not made.net._program.evaluation(True).random
    rough = _torch_steps(module, step, call, "float32", training)
    exact = _torch_steps(module, step, call, "float64", training)
    ours = _live_steps(made, call, training)
    rows = [judge(n, (rough[n], exact[n]), (ours[n], None)) for n in rough if is_inexact(rough[n])]
    made.report.rows[f"{PROVED} training steps"] = rows
    if wrong := [row for row in rows if not row.same]:
        raise NotEquivalent(
            f"{step.name} trains differently: {len(wrong)} of {len(rows)} values",
            "give the loss alone, and take the step with nnx.Optimizer; please report it",
            [f"{r.name}: {r.error:.2g}, torch's rounding {r.noise:.2g}" for r in wrong[:8]],
        )


def _torch_steps(
    module: Any, step: Step, call: BoundArguments, precision: str, training: bool
) -> Any:
    import torch

    with _borrowed(module, step.optimizer, precision, training), torch.enable_grad():
        some = in_precision(call, precision)
        with step.mode_kept():
            for _ in range(PROVED):
                result = step.function(*some.args, **some.kwargs)
        found = _flat(result)
        found |= {n: to_numpy(t.detach().clone()) for n, t in module.state_dict().items()}
    return found


def _flat(result: Any) -> dict[str, Any]:
    import torch

    every = torch.utils._pytree.tree_leaves(result)
    found = [torch.tensor(x) if isinstance(x, float) else x for x in every]  # what item() gave
    tensors = [x.detach() for x in found if isinstance(x, torch.Tensor)]
    return {f"result {i}": to_numpy(x) for i, x in enumerate(tensors)}


@contextlib.contextmanager
def _borrowed(module: Any, optimizer: Any, precision: str, training: bool) -> Iterator[None]:
    """The module and its optimizer in this precision and mode, to be trained; then as they were."""
    import torch

    tensors = [*module.parameters(), *module.buffers()]
    kept = [(t, t.data, t.grad if t.is_leaf else None) for t in tensors]
    modes = [(part, part.training) for part in module.modules()]
    state, groups = optimizer.state, optimizer.param_groups
    rng = torch.get_rng_state()

    def cast(x: Any) -> Any:
        wanted = getattr(torch, dtype_in(x, precision)) if is_inexact(x) else x.dtype
        return x.detach().clone().to(wanted)

    try:
        for t, data, _ in kept:
            t.data, t.grad = cast(data), None
        optimizer.state = copy.copy(state)
        for p, held in state.items():
            optimizer.state[p] = {
                k: cast(v) if isinstance(v, torch.Tensor) and k != "step" else copy.deepcopy(v)
                for k, v in held.items()
            }
        optimizer.param_groups = [dict(g) for g in groups]
        module.train(training)
        yield
    finally:
        for t, data, grad in kept:
            t.grad = None
            t.data = data
            t.grad = grad
        optimizer.state, optimizer.param_groups = state, groups
        for part, mode in modes:
            part.training = mode
        torch.set_rng_state(rng)


def _live_steps(made: LiveStep, call: BoundArguments, training: bool) -> dict[str, Any]:
    import jax

    trained = nnx.clone(made)
    if training:
        trained.net.train()
    else:
        trained.net.eval()  # type: ignore[no-untyped-call]
    arrays = with_tensors(call, bits_of)

    @nnx.jit
    def run(step: LiveStep) -> Any:
        return step(*arrays.args, **arrays.kwargs)

    for _ in range(PROVED):
        result = run(trained)
    found = [x for x in jax.tree.leaves(result) if hasattr(x, "dtype")]
    named = {f"result {i}": to_numpy(x) for i, x in enumerate(found)}
    return named | {n: to_numpy(t) for n, t in torch_state(trained.net).items()}
