"""Names for what lies in an unpickled checkpoint: dicts and lists flattened with dots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zoo.containers.errors import CorruptInput
from zoo.containers.torch_file.builders import (
    NumpyArray,
    NumpyDtype,
    Placeholder,
    StorageRef,
    TensorRef,
)
from zoo.containers.torch_file.names import SCRIPT, Global, shown

_MAX_DEPTH = 100
_MAX_WORK = 1 << 20  # a few kB of pickle can hold 2^40 paths to the same list
_NAMED = 3  # of the values dropped, how many a notice names
_ADVICE = "save the plain state_dict instead"


class Tree:
    """The tensors and the plain data below `root`, and notices on the rest.

    Keys that are not strings are written as str() does. Lists without tensors, dicts or other
    objects in them stay whole, and so do empty dicts. Raises CorruptInput, naming `what`, where
    two things get one name, and for what is nested without end.
    """

    def __init__(self, root: Any, what: str) -> None:
        self.tensors: dict[str, TensorRef] = {}
        self.extras: dict[str, Any] = {}
        self.notices: list[str] = []
        self._what = what
        self._work = 0
        self._dropped: dict[str, list[str]] = {}
        self._dropped_count: dict[str, int] = {}
        self._walk(root)
        for kind, names in self._dropped.items():
            count = self._dropped_count[kind]
            values = "value" if count == 1 else "values"
            more = ", ..." if count > len(names) else ""
            named = ", ".join(names) + more
            self.notices.append(f"dropped: {count} {values} built from {shown(kind)} ({named})")

    def _walk(self, root: Any) -> None:
        # With its own stack: a file may nest deeper than Python recurses.
        pending: list[tuple[str | None, Any, int]] = [(None, root, 0)]
        inner: set[str | None] = set()  # modules within modules
        while pending:
            name, value, depth = pending.pop()
            if depth > _MAX_DEPTH:
                self._too_deep(name)
            children: list[tuple[str, Any]]
            if isinstance(value, Placeholder) and (state := _script_state(value)) is not None:
                if name is None:
                    self.notices.append(
                        f"a TorchScript archive of class {shown(value.kind)}: its parameters and "
                        "buffers are read, its program is not"
                    )
                children = self._named(name, _script_weights(state))
            elif isinstance(value, Placeholder) and (state := _module_state(value)) is not None:
                if name not in inner:
                    self._announce(name, value)
                children, modules = self._module(name, state)
                inner |= modules
            elif isinstance(value, dict) and (value or name is None):
                children = self._named(name, value.items())
            elif isinstance(value, (list, tuple)) and not self._plain(value):
                children = self._named(name, enumerate(value))
            else:
                self._leaf(name, value)
                continue
            pending += ((child, value, depth + 1) for child, value in reversed(children))

    def _announce(self, name: str | None, module: Placeholder) -> None:
        subject = "the file" if name is None else shown(name)
        self.notices.append(
            f"{subject} is a whole pickled module of class {shown(module.kind)}: "
            "its parameters and buffers are read, its code is not run"
        )

    def _module(
        self, name: str | None, state: dict[str, Any]
    ) -> tuple[list[tuple[str, Any]], set[str | None]]:
        """What state_dict() of a module would give, in its order; and which are modules."""
        skipped = state.get("_non_persistent_buffers_set") or ()
        if not isinstance(skipped, (set, frozenset)):
            skipped = set()
        buffers = {k: v for k, v in _dict(state, "_buffers").items() if k not in skipped}
        children: list[tuple[str, Any]] = []
        modules: set[str | None] = set()
        for items in (_dict(state, "_parameters"), buffers, _dict(state, "_modules")):
            present = [(key, value) for key, value in items.items() if value is not None]
            named = self._named(name, present)
            children += named
            modules |= {n for n, value in named if isinstance(value, Placeholder)}
        return children, modules

    def _named(self, prefix: str | None, items: Iterable[tuple[Any, Any]]) -> list[tuple[str, Any]]:
        named = []
        for key, value in items:
            word = _word(key)
            if word is None:
                self._drop(f"a key of {prefix or 'the file'}", key)
                continue
            name = word if prefix is None else f"{prefix}.{word}"
            self._spend(1 + len(name) // 64)
            named.append((name, value))
        return named

    def _leaf(self, name: str | None, value: Any) -> None:
        if isinstance(value, NumpyArray) and value.array is not None:
            value = value.array
        elif isinstance(value, Global) and value.dtype is not None:
            value = f"torch.{value.dtype}"
        elif isinstance(value, NumpyDtype):
            value = value.dtype.name
        elif isinstance(value, (Placeholder, Global, StorageRef, NumpyArray)) or (
            isinstance(value, (set, frozenset)) and not self._plain(value)
        ):
            self._drop(name, value)
            return
        is_tensor = isinstance(value, TensorRef)
        if name is None:
            name = "tensor" if is_tensor else "value"
        if name in self.tensors or name in self.extras:
            raise CorruptInput(
                f"{self._what}: two things are named {shown(name)} once keys are joined with dots",
                "rename one of them where the file was written",
            )
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CorruptInput(
                f"{self._what}: the name {shown(name)} is not Unicode", _ADVICE
            ) from None
        if is_tensor:
            self.tensors[name] = value
        else:
            self.extras[name] = value

    def _drop(self, name: str | None, value: Any) -> None:
        kind = _kind(value)
        names = self._dropped.setdefault(kind, [])
        self._dropped_count[kind] = self._dropped_count.get(kind, 0) + 1
        if len(names) < _NAMED:
            names.append("the file itself" if name is None else shown(name))

    def _plain(self, items: Any, depth: int = 0) -> bool:
        """Whether there are only numbers, strings and the like in `items`, and in its lists."""
        self._spend(1 + len(items) // 8)
        if depth > _MAX_DEPTH:
            self._too_deep(None)
        for item in items:
            if isinstance(item, (list, tuple, set, frozenset)):
                if not self._plain(item, depth + 1):
                    return False
            elif item is not None and not isinstance(item, _SCALARS):
                return False
        return True

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > _MAX_WORK:
            raise CorruptInput(f"{self._what}: it holds too many values, or itself", _ADVICE)

    def _too_deep(self, name: str | None) -> None:
        where = "" if name is None else f" at {shown(name)}"
        raise CorruptInput(
            f"{self._what}: it nests more than {_MAX_DEPTH} deep, or holds itself{where}", _ADVICE
        )


def _module_state(value: Placeholder) -> dict[str, Any] | None:
    """The attributes of `value`, if it is a torch module."""
    state = value.state
    parts = isinstance(state, dict) and isinstance(state.get("_parameters"), dict)
    return state if parts and isinstance(state.get("_modules"), dict) else None


def _script_state(value: Placeholder) -> dict[str, Any] | None:
    """The attributes of `value`, if it is a module of a TorchScript archive."""
    script = value.kind == SCRIPT or value.kind.startswith(f"{SCRIPT}.")
    return value.state if script and isinstance(value.state, dict) else None


def _script_weights(state: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Its tensors, then the modules within it, as state_dict() has them; what else it has are plain
    attributes."""
    tensors = [(k, x) for k, x in state.items() if isinstance(x, TensorRef)]
    inner = [
        (k, x)
        for k, x in state.items()
        if isinstance(x, Placeholder) and _script_state(x) is not None
    ]
    return tensors + inner


def _dict(state: dict[str, Any], key: str) -> dict[Any, Any]:
    value = state.get(key)
    return value if isinstance(value, dict) else {}


def _word(key: Any) -> str | None:
    """`key` as a part of a name; None where it is an object."""
    parts = key if type(key) is tuple else (key,)
    simple = all(
        part is None
        or type(part) in (str, float, bool)
        or (type(part) is int and part.bit_length() <= 64)
        for part in parts
    )
    return str(key) if simple else None


def _kind(value: Any) -> str:
    if isinstance(value, Placeholder):
        return value.kind
    if isinstance(value, Global):
        return value.qualified
    if isinstance(value, StorageRef):
        return "a torch storage"
    if isinstance(value, TensorRef):
        return "torch.Tensor"
    if isinstance(value, NumpyArray):
        return "numpy.ndarray"
    return f"builtins.{type(value).__name__}"


_SCALARS = (bool, int, float, complex, str, bytes, bytearray)
