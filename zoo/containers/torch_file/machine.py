"""An interpreter of pickles that calls nothing.

A pickle is a program, and `pickle.load` runs it: it imports what the file names and calls it
with what the file says. This machine decodes the opcodes (`pickletools.genops` executes
nothing) and keeps its own stack. The few builders that a checkpoint needs, torch's and
NumPy's among them, are done here as plain data; anything else becomes an inert `Placeholder`,
or is refused where it could only be an attack. No name from the file is ever imported.

Time and memory stay within a constant of the pickle's own size: what copies is charged
against the bytes read, and keys whose hash a file could make slow are rationed.
"""

from __future__ import annotations

import pickletools
import struct
import warnings
from collections.abc import Callable
from itertools import islice
from typing import Any, Protocol

from zoo.containers.errors import CorruptInput, UnsafeInput
from zoo.containers.torch_file.builders import (
    BUILDERS,
    NumpyArray,
    NumpyDtype,
    PickleError,
    Placeholder,
    StorageRef,
    TensorRef,
    storage,
)
from zoo.containers.torch_file.names import Global, is_banned, shown

MAX_PICKLE = 512 << 20  # bytes; the weights lie outside the pickle
_MAX_OPS = 1 << 24
_MAX_MARKS = 1000
_MAX_KEY_PARTS = 64
_MAX_ODD_KEYS = 10_000
# What decoding nonsense can raise, most of it in pickletools.
_FAILURES: tuple[type[Exception], ...] = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error),
    *(RecursionError, MemoryError),
)
_WIDE = (1 << 61) - 1  # Python hashes an integer modulo this: wider keys can be made to collide


class Stream(Protocol):
    """What `pickletools.genops` reads from."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


def load(stream: Stream, what: str, storages: dict[str, StorageRef] | None = None) -> Any:
    """The object that the next pickle of `stream` describes, built without calling anything.

    Dictionaries of every kind are `dict`, sizes are tuples, devices and NumPy scalars plain
    strings and numbers. Raises UnsafeInput where loading the file would run code, CorruptInput
    where it is malformed; `what` names the file in both. The caller bounds the stream. Every
    storage that the pickle mentions is entered in `storages`, where it is mentioned first.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools, on a bad escape in a name
            return _Machine(stream, what, {} if storages is None else storages).run()
    except _FAILURES as e:
        raise CorruptInput(
            f"{what}: the pickle in it is malformed: {shown(str(e)) or type(e).__name__}",
            "it is truncated, damaged or no checkpoint: copy or download it again",
        ) from None


class _Machine:
    """The stack, the memo and one method `op_NAME` for each opcode that does more than push."""

    def __init__(self, stream: Stream, what: str, storages: dict[str, StorageRef]) -> None:
        self.what = what
        self.storages = storages
        self.stream = stream
        self.start = stream.tell()
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below the last mark
        self.memo: dict[int, Any] = {}
        self.copied = 0
        self.odd_keys = 0

    def run(self) -> Any:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(self.stream)):  # type: ignore[arg-type]
            if count >= _MAX_OPS:
                raise PickleError(f"it has more than {_MAX_OPS} opcodes")
            name = opcode.name
            if name in _PUSHED:
                self.stack.append(arg)
            elif name == "STOP":
                return self.pop()
            elif name in _OPS:
                _OPS[name](self, arg)
            else:
                raise PickleError(f"it uses the opcode {name}, which no checkpoint needs")
        raise PickleError("it does not end")

    # The stack.

    def pop(self) -> Any:
        if not self.stack:
            raise PickleError("it takes from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise PickleError("it takes from an empty stack")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise PickleError("it looks for a mark that was never set")
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def op_mark(self, _: Any) -> None:
        if len(self.marks) >= _MAX_MARKS:
            raise PickleError(f"it nests more than {_MAX_MARKS} deep")
        self.marks.append(self.stack)
        self.stack = []

    def op_pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def op_pop_mark(self, _: Any) -> None:
        self.pop_mark()

    def op_dup(self, _: Any) -> None:
        self.stack.append(self.top())

    def op_proto(self, version: int) -> None:
        if version > 5:
            raise PickleError(f"it is of protocol {version}; known are 0 to 5")

    def op_frame(self, length: int) -> None:
        """A hint for buffering."""
        if length > MAX_PICKLE:
            raise PickleError(f"it has a frame of {length} bytes")

    # The memo.

    def op_put(self, index: int) -> None:
        self.memo[index] = self.top()

    op_binput = op_long_binput = op_put

    def op_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.top()

    def op_get(self, index: int) -> None:
        if index not in self.memo:
            raise PickleError(f"it recalls memo {index}, which was never stored")
        self.stack.append(self.memo[index])

    op_binget = op_long_binget = op_get

    # Containers.

    def op_none(self, _: Any) -> None:
        self.stack.append(None)

    def op_newtrue(self, _: Any) -> None:
        self.stack.append(True)

    def op_newfalse(self, _: Any) -> None:
        self.stack.append(False)

    def op_empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def op_empty_list(self, _: Any) -> None:
        self.stack.append([])

    def op_empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def op_empty_set(self, _: Any) -> None:
        self.stack.append(set())

    def op_tuple1(self, _: Any) -> None:
        self.stack.append((self.pop(),))

    def op_tuple2(self, _: Any) -> None:
        b, a = self.pop(), self.pop()
        self.stack.append((a, b))

    def op_tuple3(self, _: Any) -> None:
        c, b, a = self.pop(), self.pop(), self.pop()
        self.stack.append((a, b, c))

    def op_tuple(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def op_list(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def op_frozenset(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(frozenset(self.key(item) for item in items))

    def op_dict(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.set_items(items)

    def op_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def op_setitems(self, _: Any) -> None:
        self.set_items(self.pop_mark())

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if len(items) % 2 or not isinstance(target, (dict, Placeholder)):
            raise PickleError(f"it sets items of a {type(target).__name__}")
        if isinstance(target, dict):
            for i in range(0, len(items), 2):
                target[self.key(items[i])] = items[i + 1]

    def op_append(self, _: Any) -> None:
        self.append([self.pop()])

    def op_appends(self, _: Any) -> None:
        self.append(self.pop_mark())

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Placeholder):
            raise PickleError(f"it appends to a {type(target).__name__}")

    def op_additems(self, _: Any) -> None:
        items, target = self.pop_mark(), self.top()
        if isinstance(target, set):
            target.update(self.key(item) for item in items)
        elif not isinstance(target, Placeholder):
            raise PickleError(f"it adds items to a {type(target).__name__}")

    def key(self, value: Any) -> Any:
        """`value` as a key, if hashing and comparing it is cheap."""
        kind = type(value)
        if value is None or kind in (str, bytes, bool, float) or isinstance(value, _BY_IDENTITY):
            return value
        if kind is int and -_WIDE < value < _WIDE:
            return value
        # Wide integers and tuples can be made to collide by the thousand, and the hash of a
        # tuple of a tuple of a tuple, each held twice, takes for ever.
        self.odd_keys += 1
        if self.odd_keys > _MAX_ODD_KEYS:
            raise PickleError(f"more than {_MAX_ODD_KEYS} keys are tuples or wide integers")
        parts = [value]
        for done, part in enumerate(parts):
            if done >= _MAX_KEY_PARTS:
                raise PickleError(f"a key has more than {_MAX_KEY_PARTS} parts")
            if type(part) in (tuple, frozenset):
                parts.extend(islice(part, _MAX_KEY_PARTS))
            elif type(part) in (list, dict, set, bytearray):
                raise PickleError(f"a key is a {type(part).__name__}")
        return value

    def charge(self, amount: int) -> None:
        """Account for `amount` items or bytes copied, which the memo could repeat at will."""
        self.copied += amount
        if self.copied > 4 * (self.stream.tell() - self.start) + (1 << 20):
            raise PickleError("it copies the same data over and over")

    # Names, and what the file would call.

    def op_global(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        self.stack.append(Global.of(module, name))

    def op_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise PickleError("it names a global by something other than strings")
        self.stack.append(Global.of(module, name))

    def op_reduce(self, _: Any) -> None:
        args, function = self.pop(), self.pop()
        self.stack.append(self.call(function, args))

    op_newobj = op_reduce

    def op_newobj_ex(self, _: Any) -> None:
        keywords, args, function = self.pop(), self.pop(), self.pop()
        built = self.call(function, args)
        if isinstance(built, Placeholder):
            built.state = keywords
        self.stack.append(built)

    def op_inst(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        args = tuple(self.pop_mark())
        self.stack.append(self.call(Global.of(module, name), args))

    def op_obj(self, _: Any) -> None:
        items = self.pop_mark()
        if not items:
            raise PickleError("it builds an object of no class")
        self.stack.append(self.call(items[0], tuple(items[1:])))

    def call(self, function: Any, args: Any) -> Any:
        """What `function(*args)` stands for. Nothing is called but our own builders."""
        while True:
            if not isinstance(args, tuple) or not isinstance(function, (Global, Placeholder)):
                raise PickleError(f"it calls a {type(function).__name__}")
            if isinstance(function, Placeholder):
                return Placeholder(function.kind, args)
            if is_banned(function):
                self.refuse(f"called {function.shown}({_preview(args)})")
            # These three only pass on: the callee and its arguments are among theirs.
            match function.qualified, args:
                case "torch._tensor._rebuild_from_type_v2", (inner, _, inner_args, _):
                    function, args = inner, inner_args
                case "copyreg.__newobj__" | "copyreg._reconstructor", (Global() as inner, *_):
                    function, args = inner, ()
                case _:
                    break
        builder = BUILDERS.get(function.qualified)
        built = builder(self, args) if builder else NotImplemented
        return Placeholder(function.qualified, args) if built is NotImplemented else built

    def refuse(self, deed: str) -> None:
        raise UnsafeInput(
            f"{self.what}: loading it with pickle would have {deed}",
            "nothing of it was run; delete it and get the weights from a source that you trust",
        )

    def op_build(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Global):
            self.refuse(f"changed {target.shown}")
        elif isinstance(target, Placeholder):
            target.state = state
        elif isinstance(target, NumpyDtype):
            target.set_state(state)
        elif isinstance(target, NumpyArray):
            target.set_state(self, state)
        elif not isinstance(target, (dict, TensorRef)):  # theirs are attributes, not weights
            raise PickleError(f"it sets the state of a {type(target).__name__}")

    # Storages, which torch refers to by a persistent id.

    def op_binpersid(self, _: Any) -> None:
        match self.pop():
            case ("storage", Global() as kind, key, _, int(numel), *view) if len(view) < 2:
                block = storage(kind, key, numel, *view)
                self.storages.setdefault(block.key, block)
                self.stack.append(block)
            case ("module", Global() as kind, _, _):  # a class with its source, which we ignore
                self.stack.append(kind)
            case _:
                raise PickleError("it refers to something other than a storage")


def _preview(args: tuple[Any, ...]) -> str:
    """The first argument, if it says something."""
    return ascii(args[0][:60]) if args and isinstance(args[0], str) else "..."


_LITERALS = """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES
    SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    FLOAT BINFLOAT
"""
_PUSHED = frozenset(_LITERALS.split())
_OPS: dict[str, Callable[[_Machine, Any], None]] = {
    name[3:].upper(): method for name, method in vars(_Machine).items() if name.startswith("op_")
}
_BY_IDENTITY = (Global, Placeholder, StorageRef, TensorRef, NumpyDtype, NumpyArray)
