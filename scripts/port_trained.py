"""Whether a live module trains as the torch module that it was made of, apart from its own proof.

In float64 and in train mode, with every dropout at 0: the gradients of a loss, then five steps of
SGD with momentum, and what they leave in the parameters and in the running statistics. Within 1e-10
of the scale of all of them, or 8 times what torch itself does when its weights move by a rounding:
three times, and nine times more before anything is called wrong, as such noise jumps where a ReLU
lets through what it did not. The steps are the largest of three at which a rounding stays one: with
few images, each step of a large rate may multiply it by a thousand. "too noisy" is where the
gradients themselves have such roundings. "right, in float32" is what only a rounding of float32
explains, of a module that computes in float32 whatever it is given.
Then with dropout as it was: the outputs of some keys differ, those of one key do not.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from port_judge import CLOSE, Inputs, called, doubled, shaken

STEPS, MOMENTUM = 5, 0.9
RATES, CALM = (1e-2, 1e-4, 1e-6), 1e-9  # of the scale: what a rounding may grow to
NOISY = 1e-6  # what it has to stay below for anything to be seen
SAMPLES = (3, 12)  # of torch's own noise: the second where the first does not explain a gap
_RATES = (
    "p", "drop_prob", "dropout", "dropout_prob", "attention_dropout", "activation_dropout",
    "attn_dropout", "drop_path", "layerdrop", "drop_path_rate", "dropout_p", "hidden_dropout",
)  # fmt: skip
KEYS = 24  # that are tried for one which drops something else
Tensors = dict[str, np.ndarray]


def trained(module: Any, inputs: Inputs) -> dict[str, Any]:
    """What becomes of five training steps: outcome, the worst gap, and what was trained."""
    import convert
    from zoo.containers.errors import ZooError

    module, inputs = module.double(), doubled(inputs)
    with_dropout = copy.deepcopy(module)
    dropped = without_dropout(module)
    try:
        net = convert.to_flax(copy.deepcopy(module), inputs, verify=False)
        net.train()
    except ZooError as e:
        return {"outcome": "refused", "why": e.problem, "details": list(e.details)[:12]}
    for rate in RATES:
        torchs = torch_steps(copy.deepcopy(module), inputs, rate)
        noise = [moved(module, inputs, rate, seed) for seed in range(SAMPLES[0])]
        grown = compared(torchs, noise[0], noise[1:])[0]
        if grown <= CALM:
            break
    if grown > NOISY:
        return {"outcome": "too noisy", "why": f"a rounding becomes {grown:.2g} of the scale"}
    try:
        ours = flax_steps(net, inputs, rate)
    except ZooError as e:
        return {"outcome": "refused", "why": e.problem, "details": list(e.details)[:12]}
    outcome = "right"
    worst, wrong = compared(torchs, ours, noise)
    if wrong:
        noise += [moved(module, inputs, rate, seed) for seed in range(*SAMPLES)]
        worst, wrong = compared(torchs, ours, noise)
    if wrong and computes_in_float32(module, inputs):
        noise += [moved(module, inputs, rate, seed, 2.0**-23) for seed in range(SAMPLES[0])]
        outcome, (worst, wrong) = "right, in float32", compared(torchs, ours, noise)
    if wrong:
        return {"outcome": "wrong", "why": wrong}
    after, gradients = torchs[1], torchs[0]
    statistics = [n for n in after if n.endswith(("running_mean", "running_var"))]
    found = {"outcome": outcome, "worst": worst, "rate": rate, "trained": len(gradients)}
    found["statistics"] = len(statistics)
    if dropped:
        try:
            live = convert.to_flax(with_dropout, inputs, verify=False)
            found["dropout"] = drops(live, inputs)
        except ZooError as e:  # layers that are left out by chance are no graph
            return {"outcome": "refused", "why": f"with dropout: {e.problem}"}
        if found["dropout"] != "drops":
            found |= {"outcome": "wrong", "why": f"dropout: {found['dropout']}"}
    return found


def moved(
    module: Any, inputs: Inputs, rate: float, seed: int, by: float = 2.0**-52
) -> tuple[Tensors, Tensors]:
    """What torch does with weights that are rounded: norms undo what scales their inputs."""
    return torch_steps(shaken(module, seed, by), inputs, rate)


def computes_in_float32(module: Any, inputs: Inputs) -> bool:
    """Whether anything in a module of float64 is computed in fewer bits."""
    from convert.runtime.call import Call
    from convert.runtime.torch_module import narrow_operation

    named = inputs if isinstance(inputs, dict) else {}
    call = Call((), named) if named else Call(tuple(inputs))
    return bool(narrow_operation(module, call))


def compared(
    torchs: tuple[Tensors, Tensors],
    ours: tuple[Tensors, Tensors],
    noise: list[tuple[Tensors, Tensors]],
) -> tuple[float, str]:
    """The worst gap of gradients and of the final state, and what of them is too far apart."""
    worst, wrong = 0.0, ""
    for kind, i in (("gradient", 0), ("after five steps", 1)):
        a, b = torchs[i], ours[i]
        scale = max((float(np.abs(x).max(initial=0)) for x in a.values()), default=1.0) or 1.0
        for name, x in a.items():
            own = max(float(np.abs(x - n[i][name]).max(initial=0)) for n in noise)
            gap = float(np.abs(x - b[name]).max(initial=0))
            worst = max(worst, gap / scale)
            if not wrong and not gap <= max(CLOSE * scale, 8 * own):
                wrong = f"{kind} of {name}: {gap / scale:.2g}"
    return worst, wrong


def without_dropout(module: Any) -> int:
    """Set every rate of dropout to 0. Gives how many there were."""
    count = 0
    for part in module.modules():
        for name in _RATES:
            value = vars(part).get(name)
            if isinstance(value, float) and 0 < value < 1:
                setattr(part, name, 0.0)
                count += 1
    return count


def weights(outputs: list[Any]) -> list[np.ndarray]:
    """The weights of a loss: one for each number of the outputs, of mean 1."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(x.shape) / max(x.size, 1) for x in outputs]


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """hardsigmoid by its formula: torch's own multiplies gradients of 64 bits by a sixth of 32."""
    from torch.nn import functional

    def hardsigmoid(x: Any, inplace: bool = False) -> Any:
        return functional.relu6(x + 3) / 6

    with mock.patch.object(functional, "hardsigmoid", hardsigmoid):
        yield


@exact()
def torch_steps(module: Any, inputs: Inputs, rate: float) -> tuple[Tensors, Tensors]:
    """The gradients of the first step, and the state after the last."""
    import torch

    module.train()
    held = {n: p for n, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(held.values(), rate, momentum=MOMENTUM)
    first: Tensors = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        outputs = [x for x in outputs_of(called(module, inputs)) if x.is_floating_point()]
        chosen = weights([x.detach().numpy() for x in outputs])
        loss = sum((x * torch.as_tensor(w)).sum() for x, w in zip(outputs, chosen, strict=True))
        loss.backward()  # type: ignore[union-attr]
        if not step:
            first = {
                n: np.zeros(p.shape) if p.grad is None else p.grad.numpy().copy()
                for n, p in held.items()
            }
        optimizer.step()
    after = {n: x.detach().numpy() for n, x in module.state_dict().items()}
    return first, {n: x for n, x in after.items() if x.dtype.kind == "f"}


def outputs_of(tree: Any) -> list[Any]:
    """torch's tensors, flat."""
    import torch

    flat, _ = torch.utils._pytree.tree_flatten(tree)
    return [x for x in flat if isinstance(x, torch.Tensor)]


def flax_steps(net: Any, inputs: Inputs, rate: float) -> tuple[Tensors, Tensors]:
    """The same of the live module, in one jit: by torch's names and axes."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import convert

    named = _named(inputs)
    given = {n: x.numpy() for n, x in named.items() if hasattr(x, "numpy")}
    fixed = {n: x for n, x in named.items() if not hasattr(x, "numpy")}

    def loss(net: Any, moving: dict[Any, Any]) -> Any:
        every = {n: moving.get(n, fixed.get(n)) for n in named}
        made = net(**every) if isinstance(inputs, dict) else net(*every.values())
        outputs = [x for x in jax.tree.leaves(made) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum((x * w).sum() for x, w in zip(outputs, weights(outputs), strict=True))

    optimizer = nnx.Optimizer(net, optax.sgd(rate, momentum=MOMENTUM), wrt=nnx.Param)

    @nnx.jit
    def step(net: Any, optimizer: Any, moving: dict[Any, Any]) -> Any:
        gradients = nnx.grad(loss)(net, moving)
        optimizer.update(net, gradients)
        return gradients

    before = None
    for _ in range(STEPS):
        gradients = step(net, optimizer, given)
        before = gradients if before is None else before
    held = nnx.clone(net)
    nnx.update(held, before)
    asked = {n: x.numpy() for n, x in convert.to_state_dict(held).items()}
    after = {n: x.numpy() for n, x in convert.to_state_dict(net).items()}
    return asked, after


def drops(net: Any, inputs: Inputs) -> str:
    """Whether dropout drops, by its key alone."""
    from flax import nnx

    net.train()
    given = {n: getattr(x, "numpy", lambda x=x: x)() for n, x in _named(inputs).items()}

    def run(seed: int) -> list[np.ndarray]:
        import jax

        made = (
            net(**given, rngs=nnx.Rngs(seed))
            if isinstance(inputs, dict)
            else net(*given.values(), rngs=nnx.Rngs(seed))
        )
        return [np.asarray(x) for x in jax.tree.leaves(made) if hasattr(x, "dtype")]

    def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    statistics = nnx.clone(net)
    one = run(0)
    nnx.update(net, nnx.state(statistics))
    if not same(one, run(0)):
        return "one key gives two results"
    # What drops a whole branch of few images now and then does so at some keys only.
    return "drops" if any(not same(one, run(key)) for key in range(1, KEYS)) else "drops nothing"


def _named(inputs: Inputs) -> dict[Any, Any]:
    return inputs if isinstance(inputs, dict) else dict(enumerate(inputs))
