"""torch.optim's update rules in NumPy float64, as a standard to hold transformations against.

Each takes the options of a param group, what is kept for the elements, the number `t` of this
update (1 for the first), gradients and parameters, all of one shape or scalars; it gives the
direction (the parameters change by -lr times it) and what is then kept. Source: the single-tensor
functions of torch.optim 2.13; `tests/test_optimizer.py` holds them against torch itself.

Some options are optax's and torch has none of them: with them a rule becomes the one that stock
optax follows. `nesterov` and `eps_root` of Adam, `eps_in_sqrt` of RMSprop, Adagrad and RAdam
(whether eps stands where optax puts it), `bias_correction` of RMSprop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Slots = dict[str, Any]
Result = tuple[Any, Slots]


def _gradient(o: Mapping[str, Any], g: Any, p: Any) -> Any:
    g = -g if o.get("maximize") else g
    decoupled = o.get("decoupled_weight_decay", False)
    return g if decoupled else g + o.get("weight_decay", 0.0) * p


def _decay(o: Mapping[str, Any], p: Any) -> Any:
    return o.get("weight_decay", 0.0) * p if o.get("decoupled_weight_decay") else 0.0


def sgd(o: Mapping[str, Any], s: Slots, t: Any, g: Any, p: Any) -> Result:
    """SGD; no buffer yet means that this is the first gradient."""
    g = _gradient(o, g, p)
    momentum = o["momentum"]
    if not momentum:
        return g, {}
    old = s.get("momentum_buffer")
    buffer = g if old is None else momentum * old + (1 - o["dampening"]) * g
    return (g + momentum * buffer if o["nesterov"] else buffer), {"momentum_buffer": buffer}


def _moments(o: Mapping[str, Any], s: Slots, g: Any) -> tuple[Any, Any]:
    b1, b2 = o["betas"]
    return b1 * s["exp_avg"] + (1 - b1) * g, b2 * s["exp_avg_sq"] + (1 - b2) * g * g


def adam(o: Mapping[str, Any], s: Slots, t: Any, g: Any, p: Any) -> Result:
    """Adam, and AdamW where `decoupled_weight_decay` says so; AMSGrad where `amsgrad` does."""
    b1, b2 = o["betas"]
    g = _gradient(o, g, p)
    m, v = _moments(o, s, g)
    kept = {"exp_avg": m, "exp_avg_sq": v}
    if o.get("amsgrad"):
        v = np.maximum(s["max_exp_avg_sq"], v)
        kept["max_exp_avg_sq"] = v
    mean = m / (1 - b1**t)
    if o.get("nesterov"):
        mean = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    root = np.sqrt(v / (1 - b2**t) + o.get("eps_root", 0.0))
    return mean / (root + o["eps"]) + _decay(o, p), kept


def adamw(o: Mapping[str, Any], s: Slots, t: Any, g: Any, p: Any) -> Result:
    """Adam whose weight decay is decoupled unless the options say otherwise."""
    return adam({"decoupled_weight_decay": True, **o}, s, t, g, p)


def adagrad(o: Mapping[str, Any], s: Slots, t: Any, g: Any, p: Any) -> Result:
    """Adagrad."""
    g = _gradient(o, g, p)
    total = s["sum"] + g * g
    inside = o.get("eps_in_sqrt")
    root = np.sqrt(total + o["eps"]) if inside else np.sqrt(total) + o["eps"]
    return g / root / (1 + (t - 1) * o["lr_decay"]), {"sum": total}


def rmsprop(o: Mapping[str, Any], s: Slots, t: Any, g: Any, p: Any) -> Result:
    """RMSprop, centered and with momentum where the options say so."""
    g = _gradient(o, g, p)
    alpha = o["alpha"]
    square = alpha * s["square_avg"] + (1 - alpha) * g * g
    kept = {"square_avg": square}
    unbiased = 1 - alpha**t if o.get("bias_correction") else 1.0
    variance = square / unbiased
    if o["centered"]:
        mean = alpha * s["grad_avg"] + (1 - alpha) * g
        kept["grad_avg"] = mean
        variance = variance - (mean / unbiased) ** 2
    inside = o.get("eps_in_sqrt")
    direction = g / (np.sqrt(variance + o["eps"]) if inside else np.sqrt(variance) + o["eps"])
    if o["momentum"]:
        buffer = o["momentum"] * s["momentum_buffer"] + direction
        kept["momentum_buffer"] = buffer
        direction = direction + o["momentum"] * buffer if o.get("nesterov") else buffer
    return direction, kept


def adadelta(o: Mapping[str, Any], s: Slots, t: Any, g: Any, p: Any) -> Result:
    """Adadelta."""
    g = _gradient(o, g, p)
    rho, eps = o["rho"], o["eps"]
    square = rho * s["square_avg"] + (1 - rho) * g * g
    delta = np.sqrt(s["acc_delta"] + eps) / np.sqrt(square + eps) * g
    return delta, {
        "square_avg": square,
        "acc_delta": rho * s["acc_delta"] + (1 - rho) * delta * delta,
    }


def nadam(o: Mapping[str, Any], s: Slots, t: Any, g: Any, p: Any) -> Result:
    """NAdam; `mu_product` is the product of its momentum schedule so far."""
    b1, b2 = o["betas"]
    g = _gradient(o, g, p)
    m, v = _moments(o, s, g)
    mu = b1 * (1 - 0.5 * 0.96 ** (t * o["momentum_decay"]))
    following = b1 * (1 - 0.5 * 0.96 ** ((t + 1) * o["momentum_decay"]))
    product = s["mu_product"] * mu
    root = np.sqrt(v / (1 - b2**t)) + o["eps"]
    of_average = following / (1 - product * following)
    direction = ((1 - mu) / (1 - product) * g + of_average * m) / root
    kept = {"exp_avg": m, "exp_avg_sq": v, "mu_product": product}
    return direction + _decay(o, p), kept


def radam(o: Mapping[str, Any], s: Slots, t: Any, g: Any, p: Any) -> Result:
    """RAdam."""
    b1, b2 = o["betas"]
    g = _gradient(o, g, p)
    m, v = _moments(o, s, g)
    unbiased = np.sqrt(1 - b2**t)
    longest = 2 / (1 - b2) - 1
    length = np.asarray(longest - 2 * t * b2**t / (1 - b2**t))
    safe = np.where(length > 5, length, 6.0)
    rect = np.sqrt((safe - 4) * (safe - 2) * longest / ((longest - 4) * (longest - 2) * safe))
    root = np.sqrt(v) + o["eps"] * (unbiased if o.get("eps_in_sqrt") else 1.0)
    direction = m / (1 - b1**t) * np.where(length > 5, rect * unbiased / root, 1.0)
    return direction + _decay(o, p), {"exp_avg": m, "exp_avg_sq": v}
