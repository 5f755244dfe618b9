"""One way in which a program may be changed, and what it would explain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from convert.program.operations import Operation, Program, Ref, mapped
from convert.program.replay import At, Change, Values, resolve

NAMELESS = "unknown"  # of an edit that tells where, but may stand for several mistakes
Changes = Mapping[int, Change]  # by index of the operation


@dataclass
class Edit:
    """The lower its cost, the likelier it is that somebody makes this mistake."""

    cost: float
    cause: str  # a word of causes.CAUSES
    said: str  # what Flax's values fit: "a softmax over axis 1"
    changes: Changes = field(default_factory=dict)
    leaves: Mapping[int, Callable[[Any], Any]] = field(default_factory=dict)
    # A number to be solved for: the changes that it makes. `said` then has {number}.
    free: Callable[[float], Changes] | None = None
    start: float = 1.0
    at: int = -1  # the operation that is said to differ; -1: the first of `changes`
    omits: bool = False  # whether an operation is left out: it may come later instead

    @property
    def place(self) -> int:
        """The operation at which it stands."""
        return self.at if self.at >= 0 else min(self.changes, default=-1)


@dataclass
class Node:
    """One operation of a program, with the values of a run."""

    index: int
    operation: Operation
    program: Program
    values: Values

    @property
    def name(self) -> str:
        """The operation's name."""
        return self.operation.name

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments with their values."""
        return mapped(self.operation.args, self._value)  # type: ignore[no-any-return]

    @property
    def tensors(self) -> list[Any]:
        """The tensors that it takes."""
        return [self.values[r] for r in self.operation.refs]

    @property
    def out(self) -> Any:
        """The first tensor that it gives."""
        return self.values.get(self.operation.made[0])

    def _value(self, x: Any) -> Any:
        return self.values[x.value] if isinstance(x, Ref) else x

    def edit(self, cost: float, cause: str, said: str, change: Change) -> Edit:
        """An edit of this operation alone."""
        return Edit(cost, cause, said, {self.index: change})


def is_table(node: Node) -> bool:
    """Whether a value follows from numbers in the code alone, as frequencies and positions do."""
    return set(node.operation.refs) <= node.program.tables


Path = tuple[Any, ...]


def scalars(operation: Operation) -> Iterator[tuple[Path, Any]]:
    """The plain values among the arguments, each with its path: ("kwargs", "dim"), (1, 0)."""

    def walk(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        if isinstance(tree, Mapping):
            for key, part in tree.items():
                yield from walk(part, (*path, key))
        elif isinstance(tree, tuple | list):
            for i, part in enumerate(tree):
                yield from walk(part, (*path, i))
        elif not isinstance(tree, Ref):
            yield path, tree

    yield from walk(operation.args, ())
    yield from walk(operation.kwargs, ("kwargs",))


def with_scalar(path: Path, value: Any) -> Change:
    """The operation with another value at one path of its arguments."""

    def change(at: At) -> Any:
        args, kwargs = list(at.args), dict(at.kwargs)
        if path[0] == "kwargs":
            kwargs[path[1]] = _put(kwargs[path[1]], path[2:], value)
        else:
            args[path[0]] = _put(args[path[0]], path[1:], value)
        return resolve(at.operation.function)(*args, **kwargs)

    return change


def _put(tree: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    if isinstance(tree, Mapping):
        return {**tree, path[0]: _put(tree[path[0]], path[1:], value)}
    made = list(tree)
    made[path[0]] = _put(made[path[0]], path[1:], value)
    return tuple(made) if isinstance(tree, tuple) else made


def with_values(at: At, new: dict[int, Any]) -> Any:
    """The operation on other values."""

    def value(x: Any) -> Any:
        if not isinstance(x, Ref):
            return x
        return new[x.value] if x.value in new else at.values[x.value]

    args, kwargs = mapped(at.operation.args, value), mapped(at.operation.kwargs, value)
    return resolve(at.operation.function)(*args, **kwargs)


def dims_of(operation: Operation) -> tuple[Path, Any] | None:
    """Where an operation is told its axis or axes, and which; None where it takes none."""
    for key in ("dim", "axis", "dims"):
        if operation.kwargs.get(key) is not None:
            return ("kwargs", key), operation.kwargs[key]
    at = _AXIS.get(operation.name)
    if at is not None and at < len(operation.args):
        value = operation.args[at]
        many = isinstance(value, tuple | list) and all(isinstance(v, int) for v in value)
        if many or (isinstance(value, int) and not isinstance(value, bool)):
            return (at,), value
    return None


# The position of the argument that is an axis.
_AXIS = {
    **dict.fromkeys(
        ("softmax", "log_softmax", "mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin",
         "var", "std", "cumsum", "cumprod", "cat", "stack", "flip", "logsumexp", "prod",
         "unsqueeze",
         "squeeze", "gather", "index_select", "scatter", "scatter_add", "index_add", "unbind",
         "median", "sort", "argsort", "glu", "all", "any", "concat", "softmin", "logcumsumexp",
         "index_copy", "unflatten"), 1),
    **dict.fromkeys(("chunk", "split", "repeat_interleave", "topk", "normalize", "norm", "roll",
                     "tensor_split", "diff", "cosine_similarity"), 2),
}  # fmt: skip


def word(x: float) -> str:
    """A number as people write it."""
    return f"{x:.6g}"


def named(program: Program, value: int) -> str:
    """What a value is called: a leaf by its name, another one by the expression that makes it."""
    if value in program.leaves:
        return program.leaves[value].name
    maker = program.makers.get(value)
    site = None if maker is None else program.operations[maker].site
    if maker is None or site is None:
        return "another value"
    made = program.operations[maker].made
    part = f"part {made.index(value) + 1} of " if len(made) > 1 else ""
    return f"{part}`{short(site.text)}`"


def short(text: str, width: int = 60) -> str:
    """An expression that fits into a line."""
    return text if len(text) <= width else text[: width - 3] + "..."


def first_users(program: Program) -> dict[int, int]:
    """Of each value that is taken, the first operation that takes it."""
    return {value: users[0] for value, users in program.users.items()}
