"""Tiny models that train alike in both frameworks, and every optimizer with its counterpart."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
import torch
from flax import nnx
from support import Arrays, bits, canonical
from test_models import scalar, to_canonical

from convert import optim
from convert.training_state.state import OptimizerState
from convert.training_state.torch_state import from_torch
from zoo.layout import Layout
from zoo.loading import LoadNotice, build
from zoo.registry import families

T = torch.optim
N = 20
RATE = 1e-3


class Lion(T.Optimizer):
    """As third-party packages have it (Chen 2023, algorithm 2)."""

    def __init__(self, params: Any, lr: float, betas: Any = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                m = state["exp_avg"]
                p.add_((m * b1 + p.grad * (1 - b1)).sign_(), alpha=-group["lr"])
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


Case = tuple[Callable[[Any], Any], Callable[[], Any]]
CASES: dict[str, Case] = {
    "SGD": (lambda p: T.SGD(p, RATE), lambda: optax.sgd(RATE)),
    "SGD momentum": (lambda p: T.SGD(p, RATE, 0.9), lambda: optax.sgd(RATE, 0.9)),
    "SGD nesterov": (
        lambda p: T.SGD(p, RATE, 0.9, nesterov=True, weight_decay=0.1),
        lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(RATE, 0.9, nesterov=True)),
    ),
    "SGD dampening": (
        lambda p: T.SGD(p, RATE, 0.9, 0.3, 0.1),
        lambda: optim.sgd(RATE, 0.9, 0.3, 0.1),
    ),
    "SGD behind the rate": (
        lambda p: T.SGD(p, RATE, 0.9),
        lambda: optax.chain(optax.scale(-RATE), optax.trace(0.9)),
    ),
    "Adam": (
        lambda p: T.Adam(p, RATE, weight_decay=0.1),
        lambda: optax.chain(optax.add_decayed_weights(0.1), optax.adam(RATE)),
    ),
    "AdamW": (lambda p: T.AdamW(p, RATE), lambda: optax.adamw(RATE, weight_decay=0.01)),
    "AMSGrad": (lambda p: T.Adam(p, RATE, amsgrad=True), lambda: optim.adam(RATE, amsgrad=True)),
    "Adagrad": (lambda p: T.Adagrad(p, RATE, 0.1), lambda: optim.adagrad(RATE, 0.1)),
    "Adagrad stock": (
        lambda p: T.Adagrad(p, RATE, eps=0),
        lambda: optax.adagrad(RATE, 0.0, 0.0),
    ),
    "RMSprop": (
        lambda p: T.RMSprop(p, RATE),
        lambda: optax.rmsprop(RATE, 0.99, eps_in_sqrt=False),
    ),
    "RMSprop stock": (
        lambda p: T.RMSprop(p, RATE, momentum=0.9, centered=True),
        lambda: optax.rmsprop(RATE, 0.99, eps_in_sqrt=False, centered=True, momentum=0.9),
    ),
    "RMSprop ours": (
        lambda p: T.RMSprop(p, RATE, 0.9, weight_decay=0.1, momentum=0.9, centered=True),
        lambda: optim.rmsprop(RATE, 0.9, weight_decay=0.1, momentum=0.9, centered=True),
    ),
    "Adadelta": (lambda p: T.Adadelta(p, 0.1), lambda: optax.adadelta(0.1)),
    "NAdam": (lambda p: T.NAdam(p, RATE), lambda: optim.nadam(RATE)),
    "RAdam": (lambda p: T.RAdam(p, RATE), lambda: optim.radam(RATE)),
    "RAdam stock": (lambda p: T.RAdam(p, RATE, eps=0), lambda: optax.radam(RATE, eps=0.0)),
    "Lion": (
        lambda p: Lion(p, RATE, weight_decay=0.1),
        lambda: optax.lion(RATE, weight_decay=0.1),
    ),
}
# Behind the rate there is one rounding each way; elsewhere every bit returns.
SCALED = {"SGD behind the rate", "RMSprop stock"}


@dataclass(frozen=True)
class Bench:
    """One tiny model, trained in either framework on the same loss, in float64."""

    model: Any
    config: Any

    @property
    def layout(self) -> Layout:
        return self.model.layout_of(self.config)

    def weights(self) -> Arrays:
        return {n: a.astype("float64") for n, a in canonical(self.model, self.config).items()}

    def torch(self, weights: Arrays | None = None) -> Any:
        given = self.weights() if weights is None else weights
        return build(self.model, self.config, "torch", given, param_dtype="float64")

    def flax(self, weights: Arrays | None = None) -> Any:
        given = self.weights() if weights is None else weights
        return build(self.model, self.config, "flax", given, param_dtype="float64")

    def of(self, module: Any) -> Arrays:
        """Canonical weights of either twin."""
        if isinstance(module, torch.nn.Module):
            found = {n: v.detach().numpy().copy() for n, v in module.state_dict().items()}
            ties = {e.torch[0].name for e in self.layout.entries if e.tied_to is not None}
            return {n: a for n, a in found.items() if n not in ties}
        kept = nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))
        return to_canonical(self.model, self.config, kept)

    def train_torch(self, module: Any, optimizer: Any, steps: int) -> list[float]:
        given = {k: torch.from_numpy(v) for k, v in self.model.inputs(self.config).items()}
        losses = []
        for _ in range(steps):
            loss = scalar(self.model, module(**given), "torch")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def step(self, module: Any, tx: Any) -> Callable[[Any, Any], Any]:
        """(parameters, optax state) -> (loss, parameters, optax state), compiled."""
        graph, _, rest = nnx.split(module, nnx.Param, ...)
        inputs = self.model.inputs(self.config)
        given = {k: self.model.to_flax(k, v) for k, v in inputs.items()}

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            def loss_of(params: Any) -> Any:
                return scalar(self.model, nnx.merge(graph, params, rest)(**given), "flax")

            loss, grads = jax.value_and_grad(loss_of)(params)
            updates, state = tx.update(grads, state, params)
            return loss, optax.apply_updates(params, updates), state

        return step

    def train_flax(
        self, module: Any, step: Callable[[Any, Any], Any], state: Any, steps: int
    ) -> tuple[list[float], Any]:
        params, losses = nnx.state(module, nnx.Param), []
        for _ in range(steps):
            loss, params, state = step(params, state)
            losses.append(float(loss))
        nnx.update(module, params)
        return losses, state


MLP = Bench(families()["mlp"], families()["mlp"].tiny["sigmoid"])
BERT = Bench(families()["bert"], families()["bert"].tiny["masked_lm"])
CONV = Bench(families()["convnet"], next(iter(families()["convnet"].tiny.values())))


def params_of(module: Any) -> Any:
    return nnx.state(module, nnx.Param)


def state_bits(state: OptimizerState) -> Any:
    return {(s, n): bits(a) for s, values in state.slots.items() for n, a in values.items()}


def trained(bench: Bench, make: Callable[[Any], Any], steps: int = 3) -> tuple[Any, Any]:
    """A torch twin and its optimizer after a few steps."""
    module = bench.torch()
    optimizer = make(list(module.named_parameters()))
    bench.train_torch(module, optimizer, steps)
    return module, optimizer


def state_of(make: Callable[[Any], Any], bench: Bench = MLP, steps: int = 3) -> OptimizerState:
    module, optimizer = trained(bench, make, steps)
    return from_torch(optimizer, model=module)


def close(a: list[float], b: list[float], bound: float = 1e-9) -> bool:
    return max(abs(x / y - 1) for x, y in zip(a, b, strict=True)) <= bound


def decay_groups(named: Any) -> list[dict[str, Any]]:
    """As transformers' Trainer makes them."""
    return [
        {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]


def by_kind(params: Any) -> Any:
    return jax.tree.map_with_path(
        lambda path, _: "kernels" if "kernel" in str(path) else "rest", params
    )


def flat_names(tree: Any, prefix: str = "") -> Arrays:
    from convert.training_state.optax_leaves import flatten

    names, leaves, _ = flatten(tree)
    return {prefix + n: np.asarray(a) for n, a in zip(names, leaves, strict=True)}


def notices_of(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(w.category is LoadNotice for w in caught)
    return [str(w.message) for w in caught]


CHAINS: dict[str, Callable[[], Any]] = {
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1e6), optax.adam(RATE)),
    "schedule": lambda: optax.adam(optax.constant_schedule(RATE)),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(0.5),
    "injected schedule": lambda: optax.inject_hyperparams(optax.adam)(
        optax.constant_schedule(RATE)
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(RATE), 1),
    "MultiSteps in a chain": lambda: optax.chain(
        optax.MultiSteps(optax.adam(RATE), 1).gradient_transformation(), optax.identity()
    ),
    "finite": lambda: optax.apply_if_finite(optax.adam(RATE), 3),
    "masked": lambda: optax.chain(
        optax.masked(optax.adam(RATE), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        optax.masked(optax.adam(RATE), lambda p: jax.tree.map(lambda x: x.ndim == 1, p)),
    ),
    "parts": lambda: optax.chain(
        optax.zero_nans(),
        optax.multi_transform({"kernels": optax.adam(RATE), "rest": optax.adam(RATE)}, by_kind),
    ),
    "named": lambda: optax.named_chain(
        ("clip", optax.clip(1e6)), ("adam", optax.inject_hyperparams(optax.adam)(RATE))
    ),
    "ours": lambda: optax.chain(optax.clip(1e6), optim.adam(optax.constant_schedule(RATE))),
}
