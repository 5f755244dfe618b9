"""What torch.export gives, read into a `Graph`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.program.called_modules import CalledModules
from convert.program.graph import (
    ArrayType,
    CodeLine,
    Dtype,
    Graph,
    GraphNode,
    Guard,
    Placeholder,
    ValueRef,
    live,
    refs,
)
from convert.program.nesting import Nesting
from convert.program.stack_lines import is_made_up
from convert.program.whole_recurrent import aten
from convert.tensors import bits_of

_DROPPED = {
    "device", "layout", "pin_memory", "memory_format", "non_blocking", "requires_grad",
}  # fmt: skip
_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+)(?:, in (?P<function>[^\n]*))?[^\n]*'
    r"(?:\n +(?P<text>[^\n]*))?"
)
_KINDS = {
    "PARAMETER": "parameter",
    "BUFFER": "buffer",
    "CONSTANT_TENSOR": "constant",
    "USER_INPUT": "input",
}
_ROOT = "module."  # the exported wrapper holds the user's module under this name


class Reading:
    """One exported program. `paths` are those of the inputs, in their order."""

    def __init__(self, exported: Any, paths: list[str]) -> None:
        self.exported = exported
        self.paths = iter(paths)
        self.numbers: dict[Any, int] = {}
        self.nodes: list[GraphNode] = []
        self.placeholders: list[Placeholder] = []
        self.constants: dict[str, Any] = {}
        self.schemas: dict[str, str] = {}
        self.types: dict[int, Any] = {}
        self.number_arguments: dict[str, frozenset[int | str]] = {}
        self.inputs: dict[str, str] = {}  # torch's name of an input -> its path

    def graph(self, outputs: Nesting, calls: CalledModules | None = None) -> Graph:
        """The program as data, without what nothing depends on. What `calls` left among the
        results says which modules were called."""
        signature = self.exported.graph_signature
        specs = iter(signature.input_specs)
        results: list[Any] = []
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, next(specs))
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "get_attr":
                self._attribute(node)
            elif node.op == "output":
                results = [self._argument(x) for x in node.args[0]]
        mutations: dict[str, ValueRef] = {}
        given, written = [], []
        for spec, made in zip(signature.output_specs, results, strict=True):
            if spec.kind.name == "USER_OUTPUT":
                given.append(made)
            elif spec.kind.name == "USER_INPUT_MUTATION":
                written.append(self.inputs.get(spec.target, spec.target))
            elif spec.target and isinstance(made, ValueRef):
                mutations[_own(spec.target)] = made
        marks = len(calls.marks) if calls is not None else 0
        given, marked = given[: len(given) - marks], given[len(given) - marks :]
        wanted = set(refs((given, mutations)))
        nodes = live(self.nodes, wanted)
        known = self._symbols()
        return Graph(
            nodes=nodes,
            placeholders=self.placeholders,
            baked={},
            outputs=outputs,
            results=given,
            mutations=mutations,
            constants=self.constants,
            symbols=known,
            guards=list(self._guards(known)),
            schemas=self.schemas,
            types=self.types,
            numbers=self.number_arguments,
            calls=[] if calls is None else calls.read(marked, {n.made: n for n in self.nodes}),
            notices=[
                f"it writes into its argument {n}, which stays as it is here" for n in written
            ],
        )

    def _placeholder(self, node: Any, spec: Any) -> None:
        value = node.meta.get("val")
        kind = _KINDS.get(spec.kind.name)
        if kind is None or not hasattr(value, "shape"):
            self._number(node)
            return
        name = next(self.paths) if kind == "input" else _own(spec.target)
        if kind == "constant" or (kind == "buffer" and spec.persistent is False):
            self.constants[name] = bits_of(self.exported.constants[spec.target])
        if kind == "input":
            self.inputs[node.name] = name
        shape = tuple(map(as_size, value.shape))
        dtype = str(value.dtype).removeprefix("torch.")
        self.placeholders.append(
            Placeholder(self._number(node), kind, name, shape, dtype)  # type: ignore[arg-type]
        )

    def _attribute(self, node: Any) -> None:
        import torch

        value = self.exported.graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Tensor):
            name = f"{node.target}"
            self.constants[name] = bits_of(value)
            dtype = str(value.dtype).removeprefix("torch.")
            shape = tuple(value.shape)
            made = Placeholder(self._number(node), "constant", name, shape, dtype)
            self.placeholders.append(made)

    def _call(self, node: Any) -> None:
        op = aten(_operation(node.target))
        kwargs = {k: self._argument(v) for k, v in node.kwargs.items() if k not in _DROPPED}
        path, cls = _module(node.meta.get("nn_module_stack") or {})
        args = tuple(self._argument(x) for x in node.args)
        frames = frames_of(node.meta.get("stack_trace"))
        made = self._number(node)
        self.nodes.append(GraphNode(op, args, kwargs, made, path, cls, _site(frames), frames))
        schema = getattr(node.target, "_schema", None)
        if schema is not None and op not in self.schemas:
            self.schemas[op] = _arguments(schema)
            self.number_arguments[op] = frozenset(_numbers(schema))

    def _number(self, node: Any) -> int:
        number = self.numbers.setdefault(node, len(self.numbers))
        self.types[number] = _type(node.meta.get("val"))
        return number

    def _argument(self, x: Any) -> Any:
        import torch

        if isinstance(x, torch.fx.Node):
            return ValueRef(self.numbers[x]) if x.op != "get_attr" or x in self.numbers else None
        if isinstance(x, torch.dtype):
            return Dtype(str(x).removeprefix("torch."))
        if isinstance(x, torch.device | torch.layout | torch.memory_format):
            return None
        if isinstance(x, list | tuple):
            return [self._argument(part) for part in x]
        if isinstance(x, slice):
            return slice(*(self._argument(p) for p in (x.start, x.stop, x.step)))
        if isinstance(x, Mapping):
            return {k: self._argument(v) for k, v in x.items()}
        return x

    def _symbols(self) -> dict[str, tuple[str, int]]:
        """Where each size can be read: an axis of an input that is that size and no other."""
        found: dict[str, tuple[str, int]] = {}
        for p in self.placeholders:
            for axis, size in enumerate(p.shape if p.kind == "input" else ()):
                if isinstance(size, str) and size.isidentifier():
                    found.setdefault(size, (p.name, axis))
        return found

    def _guards(self, known: Mapping[str, Any]) -> Iterator[Guard]:
        """What torch found to hold of the traced sizes, and took for granted."""
        values = (n.meta.get("val") for n in self.exported.graph.nodes if n.op == "placeholder")
        modes = (getattr(v, "fake_mode", None) for v in values)
        shapes: Any = next((m.shape_env for m in modes if m is not None and m.shape_env), None)
        for guard in [] if shapes is None else shapes.guards:
            expression = guard.expr
            for _ in range(8):
                expression = expression.xreplace(shapes.replacements)
            names = {str(s) for s in expression.free_symbols}
            if names and names <= known.keys():
                yield Guard(_printed(expression), _line_of(guard))
        for symbol, ranges in self.exported.range_constraints.items():
            if str(symbol) in known:
                low, high = ranges.lower, ranges.upper
                yield Guard(f"{symbol} >= {max(int(low), 2)}")
                if high.is_finite and high < 2**62:
                    yield Guard(f"{symbol} <= {int(high)}")


def frames_of(trace: str | None) -> tuple[CodeLine, ...]:
    """The lines of a stack trace, outermost first."""
    return tuple(
        CodeLine(m["file"], int(m["line"]), (m["text"] or "").strip(), m["function"])
        for m in _FRAME.finditer(trace or "")
    )


def site_of(trace: str | None) -> CodeLine | None:
    """The innermost line of a stack trace that is not torch's own."""
    return _site(frames_of(trace))


def _site(frames: Sequence[CodeLine]) -> CodeLine | None:
    return next((f for f in reversed(frames) if not is_torchs(f.file)), None)


def is_torchs(file: str) -> bool:
    """Whether a file is torch's own, or of ours around it."""
    parts = Path(file).parts
    installed = "site-packages" in parts or "dist-packages" in parts
    ours = Path(file).parent == Path(__file__).parent
    torchs = (installed and "torch" in parts) or parts[:1] == ("torch",)
    return ours or torchs or is_made_up(file)


def _line_of(guard: Any) -> CodeLine | None:
    """The user's line that a guard comes from."""
    frame = getattr(guard.sloc, "framework_loc", None)
    file, line = getattr(frame, "filename", None), getattr(frame, "lineno", None)
    if file and line and not is_torchs(file):
        return CodeLine(file, line)
    found = re.findall(r"(\S+\.py):(\d+)", str(getattr(guard.sloc, "maybe_user_loc", None)))
    own = [(file, line) for file, line in found if not is_torchs(file)]
    return CodeLine(own[-1][0], int(own[-1][1])) if own else None


def _own(target: str) -> str:
    return str(target).removeprefix(_ROOT)


def _operation(target: Any) -> str:
    """ "aten.add.Tensor", "operator.mul", "math.floor", "torch.sym_max"."""
    if hasattr(target, "_schema"):
        return str(target)
    module = getattr(target, "__module__", "") or ""
    name = getattr(target, "__name__", str(target))
    module = {"_operator": "operator", "builtins": "builtins"}.get(module, module)
    return f"{module}.{name}"


def _module(stack: Mapping[str, Any]) -> tuple[str, str]:
    """The path and class of the module whose call is innermost."""
    for path, cls in reversed(list(stack.values())):
        if path == "module" or path.startswith(_ROOT):
            name = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
            return _own(path) if path != "module" else "", name
    return "", ""


def as_size(s: Any) -> Any:
    """A SymInt as the graph has it, as an expression; anything else as it is."""
    return _printed(s.node.expr) if hasattr(s, "node") else s


def _type(value: Any) -> Any:
    """What a value is, as `Graph.types` has it."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return ArrayType(tuple(map(as_size, value.shape)), str(value.dtype).removeprefix("torch."))
    if isinstance(value, list | tuple):
        return [_type(x) for x in value]
    return as_size(value)


def _printed(expression: Any) -> Any:
    if expression.is_number and expression.is_integer:
        return int(expression)
    from torch.utils._sympy.printers import PythonPrinter

    printed = str(PythonPrinter().doprint(expression))  # torch's functions for its own symbols
    return printed.replace("torch.sym_float(", "float(").replace("torch._sym_sqrt(", "math.sqrt(")


_NUMBERS = re.compile(r"(?:SymInt|Scalar|float|Tensor)(?:\(\w+!?\))?(?:\[\d*\])?\?? ")


def _numbers(schema: Any) -> Iterator[int | str]:
    """The places and names of arguments that may be sizes or other numbers, not axes."""
    given = str(schema).partition("(")[2].rpartition(" -> ")[0].removesuffix(")")
    texts = [t for t in re.split(r", (?![^\[]*\])", given) if t != "*"]
    for k, (text, a) in enumerate(zip(texts, schema.arguments, strict=True)):
        if _NUMBERS.match(text):
            yield from (k, a.name)


def _arguments(schema: Any) -> str:
    """The arguments of an operation as Python writes them."""
    parts, keywords = [], False
    for a in schema.arguments:
        if a.name in _DROPPED:
            continue
        if a.kwarg_only and not keywords:
            parts.append("*")
            keywords = True
        name = "input" if a.name == "self" else a.name
        parts.append(f"{name}={a.default_value!r}" if a.has_default_value() else name)
    return ", ".join(parts)
