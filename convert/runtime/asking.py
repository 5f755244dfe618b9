"""Code that asks for the numbers of what it has just computed: `np.asarray(jnp.transpose(ids))`.

That runs as it is, but not while JAX traces it, where constants are traced like all else, unless
they are computed at once. What is computed at once is in no jaxpr, so only such code is run so.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

_KNOWN: weakref.WeakSet[Any] = weakref.WeakSet()


def _key(owner: Any) -> Any:
    """What is kept of a class or a function: methods are made anew whenever they are taken."""
    return owner if isinstance(owner, type) else getattr(owner, "__code__", type(owner))


def asks(owner: Any) -> bool:
    """Whether the code of a class, or a function, is known to be such."""
    return _key(owner) in _KNOWN


def remember_asking(owner: Any) -> None:
    """It is such."""
    _KNOWN.add(_key(owner))


def computed_at_once(owner: Any) -> contextlib.AbstractContextManager[None]:
    """Where constants of such code are computed at once, and nothing changes for other code."""
    import jax

    return jax.ensure_compile_time_eval() if asks(owner) else contextlib.nullcontext()
