"""optax transformations that follow torch's rule where optax's own do not.

    tx = convert.optim.nadam(2e-3, momentum_decay=4e-3)
    opt_state = convert.load_optimizer("checkpoint.pt", tx, model)

Each is one `optax.GradientTransformation` for any tree of parameters, and goes wherever optax's own
go: chains, masks, schedules as the learning rate, `inject_hyperparams`, `jax.jit`. A state has
torch's names and torch's meaning, so it is moved bit for bit; what is kept has the dtype of its
parameter. Gradients and parameters are real and floating; rates and decays are plain numbers.

Largest relative gap of the loss to torch within 100 steps of a small regression in float64
(`tests/test_optim.py` measures it again), stock optax and ours:

    SGD, dampening 0.1             1e-1    7e-16     optax has no dampening
    Adam, AMSGrad                  4e-1    1e-15     optax: maximum of bias-corrected moments
    Adagrad, eps 1e-10             8e-9    6e-16     optax: eps inside the root
    RMSprop, eps in the root       8e-5    6e-16     optax: eps inside the root unless told
    RMSprop, momentum, rate / 10   1e-1    9e-16     optax: momentum keeps the old rate
    NAdam                          3e-2    8e-16     optax: no momentum schedule
    RAdam, eps 1e-8                3e-7    3e-15     optax: eps after the bias correction

Stock optax equals torch to rounding for SGD without dampening, Adam, AdamW, Adadelta, Lion, RMSprop
with `eps_in_sqrt=False`, and Adagrad and RAdam with eps 0.

Sources: the single-tensor functions of torch.optim 2.11 to 2.13, and the papers that they cite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from zoo.containers.errors import MissingExtra

Rate = Any  # a number, or a schedule: a function from the number of updates so far to a number


class SGDState(NamedTuple):
    """Of `sgd`. `momentum_buffer` is () without momentum."""

    count: Any  # int32: updates so far
    momentum_buffer: Any


class AdamState(NamedTuple):
    """Of `adam` and `adamw`. `max_exp_avg_sq` is () without amsgrad."""

    count: Any
    exp_avg: Any
    exp_avg_sq: Any
    max_exp_avg_sq: Any


class AdagradState(NamedTuple):
    """Of `adagrad`."""

    count: Any
    sum: Any


class RMSpropState(NamedTuple):
    """Of `rmsprop`. `grad_avg` is () unless centered, `momentum_buffer` without momentum."""

    count: Any
    square_avg: Any
    grad_avg: Any
    momentum_buffer: Any


class NAdamState(NamedTuple):
    """Of `nadam`. `mu_product` is one float32, as torch keeps it."""

    count: Any
    mu_product: Any
    exp_avg: Any
    exp_avg_sq: Any


class RAdamState(NamedTuple):
    """Of `radam`."""

    count: Any
    exp_avg: Any
    exp_avg_sq: Any


def sgd(
    learning_rate: Rate,
    momentum: Any = 0.0,
    dampening: Any = 0.0,
    weight_decay: Any = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Any:
    """torch.optim.SGD (Sutskever 2013): the first gradient enters the buffer undampened."""
    if nesterov and (_off(momentum) or not _off(dampening)):
        raise ValueError("Nesterov momentum needs a momentum, and no dampening")
    jax, jnp = _jax()

    def init(params: Any) -> SGDState:
        return SGDState(_zero(jnp), () if _off(momentum) else _zeros(params))

    def rule(g: Any, s: SGDState, t: Any) -> tuple[SGDState, Any]:
        if _off(momentum):
            return s, g
        kept = jnp.where(t == 1, 1.0, 1.0 - dampening)
        buffer = jax.tree.map(lambda b, x: _as(momentum, b) * b + _as(kept, x) * x, s[1], g)
        if nesterov:
            return SGDState(s.count, buffer), jax.tree.map(
                lambda x, b: x + _as(momentum, b) * b, g, buffer
            )
        return SGDState(s.count, buffer), buffer

    return _transformation(init, rule, learning_rate, weight_decay, False, maximize)


def adam(
    learning_rate: Rate,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Any:
    """torch.optim.Adam (Kingma 2014); with `amsgrad` Reddi 2018, the maximum uncorrected.

    `weight_decay` is added to the gradient; `adamw` decouples it.
    """
    init, rule = _adam(b1, b2, eps, amsgrad)
    return _transformation(init, rule, learning_rate, weight_decay, False, maximize)


def adamw(
    learning_rate: Rate,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Any:
    """torch.optim.AdamW (Loshchilov 2017): `weight_decay` times the rate shrinks the weights."""
    init, rule = _adam(b1, b2, eps, amsgrad)
    return _transformation(init, rule, learning_rate, weight_decay, True, maximize)


def adagrad(
    learning_rate: Rate,
    lr_decay: Any = 0.0,
    weight_decay: Any = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: Any = 1e-10,
    maximize: bool = False,
) -> Any:
    """torch.optim.Adagrad (Duchi 2011): eps outside the root; the rate falls by `lr_decay`."""
    jax, jnp = _jax()

    def init(params: Any) -> AdagradState:
        start = initial_accumulator_value
        return AdagradState(_zero(jnp), jax.tree.map(lambda p: jnp.full_like(p, start), params))

    def rule(g: Any, s: AdagradState, t: Any) -> tuple[AdagradState, Any]:
        total = jax.tree.map(lambda a, x: a + x * x, s.sum, g)
        slower = 1.0 + (t - 1) * lr_decay
        direction = jax.tree.map(
            lambda x, a: x / (jnp.sqrt(a) + _as(eps, a)) / _as(slower, x), g, total
        )
        return AdagradState(s.count, total), direction

    return _transformation(init, rule, learning_rate, weight_decay, False, maximize)


def rmsprop(
    learning_rate: Rate,
    alpha: Any = 0.99,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    momentum: Any = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> Any:
    """torch.optim.RMSprop (Hinton 2012, centered Graves 2013): eps outside the root, and momentum
    of what the rate has not yet scaled."""
    jax, jnp = _jax()

    def init(params: Any) -> RMSpropState:
        return RMSpropState(
            _zero(jnp),
            _zeros(params),
            _zeros(params) if centered else (),
            () if _off(momentum) else _zeros(params),
        )

    def rule(g: Any, s: RMSpropState, t: Any) -> tuple[RMSpropState, Any]:
        square = _average(s.square_avg, _squares(g), alpha)
        mean = _average(s.grad_avg, g, alpha) if centered else ()
        variance = jax.tree.map(lambda v, m: v - m * m, square, mean) if centered else square
        direction = jax.tree.map(lambda x, v: x / (jnp.sqrt(v) + _as(eps, v)), g, variance)
        if _off(momentum):
            return RMSpropState(s.count, square, mean, ()), direction
        buffer = jax.tree.map(lambda b, d: _as(momentum, b) * b + d, s.momentum_buffer, direction)
        return RMSpropState(s.count, square, mean, buffer), buffer

    return _transformation(init, rule, learning_rate, weight_decay, False, maximize)


def nadam(
    learning_rate: Rate,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    momentum_decay: Any = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Any:
    """torch.optim.NAdam (Dozat 2016), whose momentum follows a schedule of its own.

    The product of that schedule is kept in float32, as torch keeps it.
    """
    jax, jnp = _jax()

    def init(params: Any) -> NAdamState:
        return NAdamState(_zero(jnp), jnp.ones((), jnp.float32), _zeros(params), _zeros(params))

    def rule(g: Any, s: NAdamState, t: Any) -> tuple[NAdamState, Any]:
        step = t.astype(float)
        mu = b1 * (1.0 - 0.5 * 0.96 ** (step * momentum_decay))
        following = b1 * (1.0 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
        product = s.mu_product * mu.astype(s.mu_product.dtype)
        wide = product.astype(step.dtype)
        of_gradient = (1.0 - mu) / (1.0 - wide)
        of_average = following / (1.0 - wide * following)
        mean = _average(s.exp_avg, g, b1)
        square = _average(s.exp_avg_sq, _squares(g), b2)
        corrected = _correction(b2, t)

        def one(x: Any, m: Any, v: Any) -> Any:
            root = jnp.sqrt(v / _as(corrected, v)) + _as(eps, v)
            return (_as(of_gradient, x) * x + _as(of_average, m) * m) / root

        return NAdamState(s.count, product, mean, square), jax.tree.map(one, g, mean, square)

    return _transformation(
        init, rule, learning_rate, weight_decay, decoupled_weight_decay, maximize
    )


def radam(
    learning_rate: Rate,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Any:
    """torch.optim.RAdam (Liu 2019): eps beside the root before its bias is corrected."""
    jax, jnp = _jax()

    def init(params: Any) -> RAdamState:
        return RAdamState(_zero(jnp), _zeros(params), _zeros(params))

    def rule(g: Any, s: RAdamState, t: Any) -> tuple[RAdamState, Any]:
        mean = _average(s.exp_avg, g, b1)
        square = _average(s.exp_avg_sq, _squares(g), b2)
        longest = 2.0 / (1.0 - b2) - 1.0
        length = _length(b2, t)
        rectified = length > 5.0
        safe = jnp.where(rectified, length, 6.0)
        rect = jnp.sqrt(
            (safe - 4.0) * (safe - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * safe)
        )
        adapted = jnp.sqrt(_correction(b2, t)) * rect
        unbiased = _correction(b1, t)

        def one(m: Any, v: Any) -> Any:
            scale = jnp.where(rectified, _as(adapted, v) / (jnp.sqrt(v) + _as(eps, v)), 1.0)
            return m / _as(unbiased, m) * scale.astype(m.dtype)

        return RAdamState(s.count, mean, square), jax.tree.map(one, mean, square)

    return _transformation(
        init, rule, learning_rate, weight_decay, decoupled_weight_decay, maximize
    )


def _adam(b1: Any, b2: Any, eps: Any, amsgrad: bool) -> tuple[Any, Any]:
    jax, jnp = _jax()

    def init(params: Any) -> AdamState:
        most = _zeros(params) if amsgrad else ()
        return AdamState(_zero(jnp), _zeros(params), _zeros(params), most)

    def rule(g: Any, s: AdamState, t: Any) -> tuple[AdamState, Any]:
        mean = _average(s.exp_avg, g, b1)
        square = _average(s.exp_avg_sq, _squares(g), b2)
        most = jax.tree.map(jnp.maximum, s.max_exp_avg_sq, square) if amsgrad else ()
        unbiased, root = _correction(b1, t), jnp.sqrt(_correction(b2, t))

        def one(m: Any, v: Any) -> Any:
            return m / _as(unbiased, m) / (jnp.sqrt(v) / _as(root, v) + _as(eps, v))

        direction = jax.tree.map(one, mean, most if amsgrad else square)
        return AdamState(s.count, mean, square, most), direction

    return init, rule


def _transformation(
    init: Callable[[Any], Any],
    rule: Callable[[Any, Any, Any], tuple[Any, Any]],
    learning_rate: Rate,
    weight_decay: Any,
    decoupled: bool,
    maximize: bool,
) -> Any:
    """The transformation of a rule, which gives the new state and the direction of descent."""
    import jax
    import optax

    decays = not _off(weight_decay)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if decays and params is None:
            raise ValueError("weight decay needs the parameters: tx.update(grads, state, params)")
        g = jax.tree.map(lambda x: -x, updates) if maximize else updates
        if decays and not decoupled:
            g = jax.tree.map(lambda x, p: x + _as(weight_decay, x) * p, g, params)
        count = optax.safe_increment(state.count)
        state, direction = rule(g, state, count)
        if decays and decoupled:
            direction = jax.tree.map(lambda d, p: d + _as(weight_decay, d) * p, direction, params)
        rate = learning_rate(count - 1) if callable(learning_rate) else learning_rate
        return jax.tree.map(lambda d: -_as(rate, d) * d, direction), state._replace(count=count)

    return optax.GradientTransformation(init, update)


def _average(old: Any, new: Any, decay: Any) -> Any:
    import jax

    return jax.tree.map(lambda a, x: _as(decay, a) * a + _as(1.0 - decay, a) * x, old, new)


def _squares(tree: Any) -> Any:
    import jax

    return jax.tree.map(lambda x: x * x, tree)


def _correction(decay: Any, t: Any) -> Any:
    """1 - decay^t, without the digits that the subtraction would lose in float32."""
    import jax.numpy as jnp

    return -jnp.expm1(t.astype(float) * _log(decay))


def _log(decay: Any) -> Any:
    """Its logarithm; of a plain number in float64, for that of 0.999 has few digits in float32."""
    import jax.numpy as jnp

    if isinstance(decay, int | float):
        return math.log(decay) if decay > 0 else -math.inf
    return jnp.log(decay)


def _length(b2: Any, t: Any) -> Any:
    """RAdam's rho_t: rho_inf - 2 t b2^t / (1 - b2^t).

    Both terms are near 2000 and their difference near t. In float32 the difference is therefore
    taken from the series of x / expm1(x) while x = -t log(b2) is small.
    """
    import jax.numpy as jnp

    step = t.astype(float)
    x = -step * _log(b2)
    direct = 2.0 / (1.0 - b2) - 1.0 - 2.0 * step / jnp.expm1(x)
    if step.dtype != jnp.float32 or not isinstance(b2, float) or not 0.5 < b2 < 1.0:
        return direct
    y = -math.log(b2)
    rest = 2.0 / (1.0 - b2) - 1.0 - 2.0 / y
    xx = x * x
    series = rest + step + 2.0 / y * xx * (-1 / 12 + xx * (1 / 720 - xx * (1 / 30240)))
    return jnp.where(x < 0.5, series, direct)


def _off(value: Any) -> bool:
    """Whether it is the number 0: what is traced or an array is there."""
    return isinstance(value, int | float) and value == 0


def _as(value: Any, like: Any) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(value, like.dtype)


def _zero(jnp: Any) -> Any:
    return jnp.zeros((), jnp.int32)


def _zeros(params: Any) -> Any:
    import jax
    import jax.numpy as jnp

    return jax.tree.map(jnp.zeros_like, params)


def _jax() -> tuple[Any, Any]:
    try:
        import jax
        import jax.numpy as jnp
        import optax  # noqa: F401
    except ImportError:
        raise MissingExtra("convert.optim", "flax") from None
    return jax, jnp
