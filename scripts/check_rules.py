"""Hold the table of operations (convert/porting/rules) against torch: docs/rules.json.

    scripts/check_rules.py [OP ...] [--most N] [--templates] [--write]

torch's own OpInfo samples are run in float64, and N of each operation, or 8, in float32, int64,
bool and complex64. With --write what is done is kept in docs/rules.json, and not done again unless
it is named. Every ATen overload that torch dispatches on the way is one check: the rule's values,
their dtypes, and for floats their gradients. The composite overload of the operation itself is
checked too, where the table has it. With --templates the same is asked of the expressions that a
port is written of (convert/porting/rendering/templates): "refused" is then an overload, or
arguments, without one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import types
import unittest
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from jax.tree_util import tree_flatten
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten as torch_flatten
from torch.utils._pytree import tree_map

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from convert.porting.rendering.operands import ArrayType, Operand  # noqa: E402
from convert.porting.rendering.templates import expression  # noqa: E402
from convert.porting.rules import find  # noqa: E402
from convert.program.graph import Dtype  # noqa: E402

DROPPED = ("device", "layout", "pin_memory", "memory_format", "non_blocking", "requires_grad")
DTYPES = (torch.float64, torch.float32, torch.int64, torch.bool, torch.complex64)
OTHERS = 8  # samples of an operation in a dtype other than float64
# What relative error a dtype's own rounding allows, of the largest value.
TOLERANCE = {"float64": 1e-10, "complex128": 1e-10, "bfloat16": 2e-2, "float16": 3e-3}
# torch leaves these values open: garbage, or random.
OPEN = ("empty", "new_empty", "empty_like", "empty_strided", "empty_permuted", "new_empty_strided")
# torch computes these with constants of 32 bits, in float64 too: celu's gradient is 5e-9 off.
ROUNDED = ("celu", "hardsigmoid")  # and its trigamma is good to 1e-9
ROUNDED += ("digamma", "polygamma", "special_digamma", "special_psi", "special_polygamma")
# Decompositions: which output is determined; vectors are so up to their signs alone.
DETERMINED = {"_linalg_svd": 1, "linalg_svd": 1, "_linalg_eigh": 0, "linalg_eigh": 0}
# The gradient of a triangular argument's other half: torch's is not 0, and nothing reads it.
OTHER_HALF = ("cholesky_solve", "linalg_qr", *DETERMINED)
# Of equal values these name any one.
TIES = ("kthvalue", "median", "nanmedian", "topk", "sort")


def dtype_to_jax(dtype: torch.dtype) -> np.dtype:
    """A torch dtype as NumPy's."""
    name = str(dtype).removeprefix("torch.")
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def to_jax(value: Any) -> Any:
    """A torch value as a rule gets it."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().resolve_conj().resolve_neg()
        if plain.dtype == torch.bfloat16:
            return jnp.asarray(plain.float().numpy()).astype(jnp.bfloat16)
        return jnp.asarray(plain.numpy(force=True).copy())
    return dtype_to_jax(value) if isinstance(value, torch.dtype) else value


def to_numpy(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        plain = value.detach().resolve_conj().resolve_neg()
        return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy(force=True)
    return np.asarray(value)


def _apart(ours: Any, theirs: Any, scale: float = 0.0) -> str:
    """What differs between a rule's value and torch's; "" where nothing does."""
    if isinstance(theirs, torch.Tensor):
        dtype = dtype_to_jax(theirs.dtype)
        if not hasattr(ours, "dtype") or np.dtype(ours.dtype) != dtype:
            return f"dtype {getattr(ours, 'dtype', type(ours))}, torch's is {dtype}"
    a, b = to_numpy(theirs), np.asarray(ours)
    if b.dtype == ml_dtypes.bfloat16:
        b = b.astype(np.float32)
    if a.shape != b.shape:
        return f"shape {b.shape}, torch's is {a.shape}"
    if not a.size or a.dtype == bool or a.dtype.kind in "iu":
        return "" if np.array_equal(a, b) else f"values {b.ravel()[:4]}, torch's {a.ravel()[:4]}"
    name = str(theirs.dtype).removeprefix("torch.") if isinstance(theirs, torch.Tensor) else ""
    tolerance = TOLERANCE.get(name, 2e-5)
    odd = ~np.isfinite(a)
    if not np.array_equal(a[odd], b[odd], equal_nan=True) and a.dtype.kind != "c":
        return f"not finite: {b[odd][:4]}, torch's {a[odd][:4]}"
    if a.dtype.kind == "c" and not np.array_equal(np.isfinite(b), ~odd):
        return f"not finite: {b[odd][:4]}, torch's {a[odd][:4]}"
    scale = max(scale, np.abs(a[~odd]).max(initial=0), 1.0 if tolerance > 1e-9 else 1e-3)
    error = np.abs(a[~odd] - b[~odd]).max(initial=0) / scale
    return "" if error <= tolerance else f"error {error:.1e}"


def compare(ours: Any, theirs: Any) -> str:
    """What differs between all outputs."""
    a = tree_flatten(ours)[0]
    b = [t for t in torch_flatten(theirs)[0] if t is not None]
    if len(a) != len(b):
        return f"{len(a)} outputs, torch has {len(b)}"
    return next((s for s in map(_apart, a, b) if s), "")


def type_of(x: Any) -> ArrayType:
    """The type of a tensor, or of a JAX array."""
    return ArrayType(tuple(x.shape), str(x.dtype).removeprefix("torch."))


def by_template(name: str, given: Any, values: Any, out: Any) -> Any:
    """What the expression of an overload gives. `given` are the arguments as torch has them, of
    which the expression is made, `values` the same for JAX, of which it is computed, and `out` the
    type of what torch gives. NotImplementedError where it has no expression."""
    names: dict[str, Any] = {"jax": jax, "jnp": jnp, "lax": jax.lax, "np": np, "math": math}

    def operand(x: Any, value: Any) -> Any:
        if isinstance(x, torch.Tensor):
            text = f"x{len(names)}"
            names[text] = value
            return Operand(text, type_of(x))
        return Dtype(str(x).removeprefix("torch.")) if isinstance(x, torch.dtype) else x

    leaves, form = torch_flatten(given)
    operands = map(operand, leaves, torch_flatten(values)[0])
    args, kwargs = torch.utils._pytree.tree_unflatten(list(operands), form)
    text = expression(name, out, args, kwargs)
    if text is None:
        raise NotImplementedError("no expression")
    found = eval(text, names)
    if any(getattr(part, "weak_type", False) for part in tree_flatten(found)[0]):
        raise TypeError(f"weakly typed: {text}")
    return found


class _Key:
    """A rule's `rng`."""

    def __init__(self) -> None:
        self.key = jax.random.key(0)

    def __call__(self) -> Any:
        self.key, given = jax.random.split(self.key)
        return given


def _weights(x: torch.Tensor) -> torch.Tensor:
    return torch.cos(torch.arange(x.numel()).double() * 0.7).reshape(x.shape)


@dataclass
class Call:
    """An overload with its arguments, and what torch gave."""

    overload: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    templates: ClassVar[bool] = False  # whether the expression is asked instead of the rule

    @property
    def name(self) -> str:
        return str(self.overload)

    def ours(self, given: Any = None) -> Any:
        """What the rule, or the expression, gives; of other values where they are given."""
        rule = find(self.name)
        assert rule is not None, self.name
        kwargs = {k: v for k, v in self.kwargs.items() if k not in DROPPED}
        values = tree_map(to_jax, (self.args, kwargs)) if given is None else given
        if self.templates:
            out = tree_map(type_of, self.overload(*self.args, **self.kwargs))
            return by_template(self.name, (self.args, kwargs), values, out)
        extra = {"rng": _Key()} if rule.random else {}
        return rule(*values[0], **values[1], **extra)

    def check(self) -> str:
        """ "" where the rule agrees, "refused: ...", or what differs."""
        theirs = self.overload(*self.args, **self.kwargs)
        try:
            ours = self.ours()
            short = self.name.split(".")[1]
            if short in DETERMINED:
                at = DETERMINED[short]
                ours, theirs = ours[at], theirs[at]
            if self.name == "aten.argsort.default":  # of equal values any comes first
                ours, theirs = to_jax(self._sorted(ours)), self._sorted(theirs)
            if short in TIES and len(torch_flatten(theirs)[0]) == 2:
                ours, theirs = ours[0], theirs[0]
            return compare(ours, theirs)
        except NotImplementedError as e:
            return f"refused: {e}"
        except Exception as e:
            return f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"

    def _sorted(self, order: Any) -> torch.Tensor:
        """The values in an order that argsort gives."""
        values = self.args[0]
        given = dict(zip(("dim", "descending"), self.args[1:], strict=False)) | self.kwargs
        at = torch.tensor(np.asarray(order))
        return values.gather(given.get("dim", -1), at) if values.ndim else values

    def check_gradient(self) -> str:
        """The same for the gradients with respect to float64 tensors among the arguments."""
        flat, spec = torch_flatten((self.args, self.kwargs))
        where = [
            i
            for i, v in enumerate(flat)
            if isinstance(v, torch.Tensor) and v.dtype == torch.float64 and v.numel()
        ]
        if not where or self.name.split(".")[1] in OTHER_HALF:
            return ""
        if any(bool(flat[i].isnan().any()) for i in where):
            return ""  # of NaN torch's gradients are now NaN, now 0
        leaves = [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in flat]
        for i in where:
            leaves[i].requires_grad_()
        try:
            args, kwargs = torch.utils._pytree.tree_unflatten(leaves, spec)
            outputs = [
                o
                for o in torch_flatten(self.overload(*args, **kwargs))[0]
                if isinstance(o, torch.Tensor) and o.requires_grad and o.dtype == torch.float64
            ]
            weights = [
                torch.cos(torch.arange(o.numel()).double() * 0.7).reshape(o.shape) for o in outputs
            ]
            total = sum((o * w.to(o)).sum() for o, w in zip(outputs, weights, strict=True))
            if not outputs:
                return ""
            theirs = torch.autograd.grad(total, [leaves[i] for i in where], allow_unused=True)
        except (RuntimeError, NotImplementedError):
            return ""  # torch has no gradient of it
        return self._gradients_apart(flat, spec, where, outputs, theirs)

    def _gradients_apart(self, flat: Any, spec: Any, where: Any, outputs: Any, theirs: Any) -> str:
        shapes = Counter(tuple(o.shape) for o in outputs)
        fixed = [to_jax(v) for v in flat]

        def total(*values: Any) -> Any:
            given = list(fixed)
            for i, value in zip(where, values, strict=True):
                given[i] = value
            args, kwargs = torch.utils._pytree.tree_unflatten(given, spec)
            kwargs = {k: v for k, v in kwargs.items() if k not in DROPPED}
            found = tree_flatten(self.ours((args, kwargs)))[0]
            found = [o for o in found if o.dtype == jnp.float64][: sum(shapes.values())]
            return sum(
                (o * jnp.cos(jnp.arange(o.size) * 0.7).reshape(o.shape)).sum() for o in found
            )

        try:
            ours = jax.grad(total, argnums=tuple(range(len(where))))(*(fixed[i] for i in where))
        except NotImplementedError as e:
            return f"refused: {e}"
        except Exception as e:
            return f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
        for a, b in zip(ours, theirs, strict=True):
            b = b.to_dense() if b is not None and b.is_sparse else b
            if self.name.split(".")[1] in ROUNDED:
                a, b = a.astype("float32"), None if b is None else b.float()
            zero = torch.zeros(a.shape, dtype=torch.float64)
            said = _apart(a, zero if b is None else b, 1e-2)  # what cancels leaves roundings behind
            if said:
                return f"gradient: {said}"
        return ""


class Recorder(TorchDispatchMode):
    """Keeps every overload that torch dispatches, with copies of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kept = tree_map(
            lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v,
            (args, kwargs or {}),
        )
        self.calls.append(Call(func, *kept))
        return func(*args, **(kwargs or {}))


def _functional(call: Call) -> bool:
    schema = call.overload._schema
    return not schema.is_mutable and all(
        v.layout == torch.strided and not v.is_quantized
        for v in torch_flatten((call.args, call.kwargs))[0]
        if isinstance(v, torch.Tensor)
    )


def calls_of(op: Any, dtype: torch.dtype, most: int) -> Iterator[list[Call]]:
    """For each sample of an operation: the overloads that it dispatches."""
    for i, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=False)):
        if i >= most:
            return
        args = (sample.input, *sample.args)
        calls = []
        packet = getattr(torch.ops.aten, op.aten_name or op.name.replace(".", "_"), None)
        for overload in packet.overloads() if packet else ():
            name = f"aten.{packet._qualified_op_name.split('::')[1]}.{overload}"
            composite = Call(getattr(packet, overload), args, sample.kwargs)
            if find(name) and _functional(composite):
                try:
                    composite.overload(*args, **sample.kwargs)
                except Exception:
                    continue
                calls.append(composite)
                break
        with Recorder() as recorder:
            op.op(*args, **sample.kwargs)
        yield calls + [c for c in recorder.calls if _functional(c)]


def _signature(call: Call) -> str:
    def said(v: Any) -> str:
        if isinstance(v, torch.Tensor):
            return f"{v.dtype}{tuple(v.shape)}{v.stride()}"
        return repr(v)

    return call.name + repr(tree_map(said, (call.args, call.kwargs)))


def judge(call: Call, gradients: bool = True) -> str:
    """One word and why: right, refused, wrong, outside."""
    rule = find(call.name)
    if rule is None:
        return "outside"
    short = call.name.split(".")[1]
    if short in OPEN or (rule.random and short not in _DETERMINED):
        return "right"
    said = call.check()
    if not said and gradients:
        said = call.check_gradient()
    return said or "right"


# Rules that take `rng` and yet give one answer, where they drop nothing.
_DETERMINED = (
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
)


def operations(names: list[str]) -> list[Any]:
    # torch's samples import it, and use nothing of it.
    if "expecttest" not in sys.modules and not find_spec("expecttest"):
        sys.modules["expecttest"] = types.ModuleType("expecttest")
        sys.modules["expecttest"].TestCase = unittest.TestCase  # type: ignore[attr-defined]
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if not names or op.name in names]


def _word(said: str) -> str:
    if said in ("right", "outside"):
        return said
    return "refused" if said.startswith("refused") else "wrong"


@dataclass
class Row:
    """What became of an operation in a dtype, by overload, and of each kind of failure the first
    arguments."""

    overloads: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    error: str = ""

    def enter(self, call: Call, said: str, key: str) -> None:
        word = _word(said)
        words = self.overloads.setdefault(call.name, {})
        words[word] = words.get(word, 0) + 1
        told = f"{call.name} {said}"[:160]
        if word in ("wrong", "refused") and told not in self.failures:
            self.failures[told] = key[:300]
            print(f"{told}\n       {key[:300]}", flush=True)


def checked(op: Any, dtype: torch.dtype, most: int, seen: set[str]) -> Row:
    """All checks of one operation in one dtype; what was seen is not checked again."""
    torch.manual_seed(0)
    row = Row()
    try:
        for call in (c for calls in calls_of(op, dtype, most) for c in calls):
            key = _signature(call)
            if key not in seen:
                seen.add(key)
                row.enter(call, judge(call), key)
    except Exception as e:
        row.error = f"{type(e).__name__}: {str(e)[:100]}"
        print(f"# {op.name} {dtype}: {row.error}", flush=True)
    jax.clear_caches()  # else the programs of every shape are kept
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--most", type=int, help="samples an operation and dtype")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--templates", action="store_true", help="the expressions, not the rules")
    options = parser.parse_args()
    if options.write and options.templates:
        parser.error("docs/rules.json is of the rules: leave out --write or --templates")
    Call.templates = options.templates
    warnings.simplefilter("ignore")
    jax.config.update("jax_enable_x64", True)
    torch.set_num_threads(1)
    file, seen = ROOT / "docs" / "rules.json", set[str]()
    rows = json.loads(file.read_text()) if options.write and file.is_file() else {}
    for dtype in DTYPES:
        most = options.most or (10**6 if dtype == torch.float64 else OTHERS)
        for op in operations(options.names):
            key = f"{str(dtype).removeprefix('torch.')} {op.name} {op.variant_test_name}".strip()
            if dtype not in op.supported_dtypes("cpu") or (key in rows and not options.names):
                continue
            rows[key] = asdict(checked(op, dtype, most, seen))
            if options.write:
                file.write_text(json.dumps(rows, indent=0, sort_keys=True) + "\n")
    words, overloads = summary(rows)
    print(words, len(overloads), "overloads")


def summary(rows: dict[str, Any]) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """How often each word was said, in all and of each overload."""
    overloads: dict[str, Counter[str]] = {}
    for row in rows.values():
        for name, words in row["overloads"].items():
            overloads.setdefault(name, Counter()).update(words)
    return dict(sum(overloads.values(), Counter())), dict(overloads)


if __name__ == "__main__":
    main()
