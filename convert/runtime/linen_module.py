"""A bound Linen module taken apart."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from convert.runtime.arrays import is_array
from convert.runtime.interception import Around
from convert.runtime.linen_calls import generators, mutable, widened, with_batch_statistics
from convert.runtime.narrow import widened_dtypes
from convert.runtime.norm_modes import Modes, switched, switches_of
from convert.runtime.pure_module import FlaxModule, Values, flatten, folded, unflatten


class LinenModule(FlaxModule):
    """As an unbound module and its variables, and the keys that it was bound with."""

    def __init__(self, module: Any, precision: str | None, training: bool) -> None:
        super().__init__(type(module), precision, training)
        self._rngs = generators(module)
        self._widened = widened_dtypes(module)
        self._given = module.scope.mutable
        self._mutable: Any = None  # what a call may change, once that is known
        self._module, variables = module.unbind()
        self._collections: dict[str, tuple[str, ...]] = {}
        self._rest: dict[tuple[str, ...], Any] = {}  # what was sown, and other trees of arrays
        with self.precise():
            for path, value in flatten(variables).items():
                if not is_array(_unboxed(value)):
                    self._rest[path] = value
                    continue
                name = ".".join(map(str, path[1:]))
                name = name if name not in self.values else ".".join(map(str, path))
                self._collections[name] = path
                self.values[name] = self._cast(_unboxed(value))
                if path[0] == "params":
                    self._trained.add(name)
                elif path[0] == "batch_stats":
                    self._moving.add(name)

    def _run(
        self, values: Values, args: Any, kwargs: Any, around: Around | None
    ) -> tuple[Any, Values]:
        from flax import linen

        every = {**self.values, **values}
        variables = self._variables(every)
        self._mutable = self._mutable or self._may_change(variables, args, kwargs)
        with contextlib.ExitStack() as stack:
            if around is not None:
                _, named = stack.enter_context(self._layer_by_layer(every, around))
                stack.enter_context(linen.intercept_methods(self._interceptor(named)))
            if self.training:
                trained = functools.partial(with_batch_statistics, self.still or ())
                stack.enter_context(linen.intercept_methods(trained))
            if self.precision:
                stack.enter_context(widened(self.precision, self._widened))
            output, moved = self._module.apply(
                variables, *args, rngs=self._rngs, mutable=self._mutable, **kwargs
            )
        names = {path: n for n, path in self._collections.items()}
        after = {names[p]: _unboxed(v) for p, v in flatten(moved).items() if p in names}
        return output, {**every, **after}

    def _variables(self, every: Values) -> dict[str, Any]:
        return unflatten(self._rest | {self._collections[n]: v for n, v in every.items()})

    def _as_users_train(self, values: Values, args: Any, kwargs: Any, modes: Modes) -> Any:
        from flax import linen

        module = self._module.clone(**switches_of(self._module))
        args, kwargs = switched(module, args, kwargs, training=True)
        with linen.intercept_methods(self._interceptor(modes)):
            return module.apply(
                self._variables({**self.values, **values}),
                *args,
                rngs=self._rngs,
                mutable=mutable(self._given, "batch_stats"),
                **kwargs,
            )[0]

    def _may_change(self, variables: Any, args: Any, kwargs: Any) -> Any:
        """In evaluation no statistics, since modules tell by that which mode they are in; but all
        of them where the module moves them even so, which is then found and named."""
        import jax
        from flax import errors

        every, still = mutable(self._given, "batch_stats"), mutable(self._given)
        if self.training or not self._moving:
            return every
        apply = functools.partial(self._module.apply, rngs=self._rngs, mutable=still)
        try:
            jax.eval_shape(lambda: apply(variables, *args, **kwargs)[0])
        except errors.ModifyScopeVariableError:
            return every
        return still

    def reseed(self) -> None:
        self._rngs = {name: folded(key) for name, key in self._rngs.items()}

    def _interceptor(self, around: Around) -> Any:
        def intercept(proceed: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if context.method_name != "__call__" or module.scope is None:
                return proceed(*args, **kwargs)
            return around(".".join(module.path), module, proceed, args, dict(kwargs))

        return intercept


def _unboxed(value: Any) -> Any:
    return value.unbox() if hasattr(value, "unbox") else value
