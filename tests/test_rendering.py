"""What a port's operations are written of: each expression against torch and against its rule."""

from __future__ import annotations

import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_rules as rules  # its cases, and not its tests
import torch
from flax import nnx
from torch.utils._pytree import tree_map

from convert.porting.fixed_draws import jax_draws
from convert.porting.plain_masks import TRI
from convert.porting.rendering import templates
from convert.porting.rendering.operands import ArrayType, Operand, SizeText
from convert.porting.rendering.templates import expression
from convert.porting.rendering.written_rules import written
from convert.porting.rules import RULES, Rule, table
from convert.program.graph import Dtype
from zoo.containers.errors import ZooError
from zoo.nn import pool_flax

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import check_rules
from check_rules import DROPPED, Call, by_template, compare, to_jax, type_of

MORE = (Path(__file__).parent / "data" / "rendering_cases.txt").read_text().partition("\n\n")[2]
# Their values are open.
ANY = ("aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default")

# torch gives 0 where a float mask leaves a row nothing to see, the expression not a number.
LEFT_OUT = "f(4, 6) * 0 - inf"


def _calls() -> dict[str, list[Call]]:
    """By the first letter of the operation: a call of each case, and all of those above."""
    found: dict[str, list[Call]] = defaultdict(list)
    seen: set[tuple[Any, str]] = set()
    more = list(rules._cases(MORE))
    for i, (name, overload, text) in enumerate([*more, *rules.SWEPT, *rules.OTHERS]):
        write = templates.templates().get(name)
        if write is None or (write, text) in seen or LEFT_OUT in text or name in ANY:
            continue
        seen.add((write, text))
        calls = list(rules._calls(overload, text))
        found[name.partition(".")[2].lstrip("_")[0]] += calls if i < len(more) else calls[:1]
    return dict(found)


CALLS = _calls()


@pytest.fixture(autouse=True)
def _expressions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Call, "templates", True)
    monkeypatch.setattr(check_rules, "TIES", ())  # what both name first
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated|.*indexing argument|.*degrees of")
        yield


def _wrong(call: Call) -> str:
    with jax.enable_x64(True):
        said = call.check()
    if call.name == "aten.topk.default":  # its indices are of 32 bits in JAX, with x64 too
        return "" if said == "dtype int32, torch's is int64" else f"topk: {said}"
    return "" if not said or said.startswith("refused") else f"{call.name}{call.args}: {said}"


@pytest.mark.parametrize("letter", sorted(CALLS))
def test_expressions_are_torchs(letter: str) -> None:
    wrong = [said for said in map(_wrong, CALLS[letter]) if said]
    assert not wrong


def _types(given: Any) -> Any:
    """What shapes and dtypes a function gives; "" where it refuses, or needs values."""
    try:
        return [type_of(x) for x in jax.tree.leaves(jax.eval_shape(given))]
    except (NotImplementedError, jax.errors.JAXTypeError):
        return ""


def _unlike_its_rule(call: Call) -> str:
    """How an expression's types differ from its rule's, of 32 bits. Warnings are errors."""
    kwargs = {k: v for k, v in call.kwargs.items() if k not in DROPPED}
    call = rules._as_dtype(Call(call.overload, call.args, kwargs), torch.float32)
    args, kwargs = tree_map(to_jax, (call.args, call.kwargs))
    rule = table()[call.name]
    extra = {"rng": None} if rule.random else {}
    given = call.args, call.kwargs
    ours = _types(lambda: by_template(call.name, given, (args, kwargs), None))
    theirs = _types(lambda: rule(*args, **kwargs, **extra))
    unlike = ours and theirs and ours != theirs
    return f"{call.name}{call.args}: {ours}, the rule's are {theirs}" if unlike else ""


@pytest.mark.parametrize("letter", sorted(CALLS))
def test_expressions_have_their_rules_types_without_x64(letter: str) -> None:
    with jax.enable_x64(False):
        wrong = [said for said in map(_unlike_its_rule, CALLS[letter]) if said]
    assert not wrong


def test_every_expression_is_tried() -> None:
    tried = {templates.TEMPLATES[c.name] for calls in CALLS.values() for c in calls}
    untried = {n for n, write in templates.templates().items() if write not in tried}
    elsewhere = {*(op for op, *_ in (*DRAWN, *LAST)), TRI}  # TRI: test_port_masks
    assert untried <= {*ANY, "aten._is_all_true.default", *elsewhere}


def _images(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=shape).astype("float32"))


def _of_images(n: int) -> list[tuple[str, tuple[Any, ...]]]:
    """Operations on arrays (B, C, *D) with n sizes D."""
    x, sizes = _images(2, 4, *(4, 6, 8)[:n]), [8, 12, 16][:n]
    weight, bias = _images(6, 4, *[3] * n), _images(6)
    linear = ("linear1d", "bilinear2d", "trilinear3d")[n - 1]
    found: list[tuple[str, tuple[Any, ...]]] = [
        (f"conv{n}d.default", (x, weight, bias, [2] * n, [1] * n)),
        (f"conv{n}d.padding", (x, weight, bias, [1] * n, "same")),
        (f"max_pool{n}d.default", (x, [2] * n)),
        (f"avg_pool{n}d.default", (x, [2] * n, [2] * n)),
        (f"adaptive_avg_pool{n}d.default", (x, [1] * n)),
        (f"upsample_nearest{n}d.vec", (x, sizes, None)),
        (f"upsample_nearest{n}d.default", (x, sizes)),
        (f"_upsample_nearest_exact{n}d.vec", (x, sizes, None)),
        (f"_upsample_nearest_exact{n}d.default", (x, sizes)),
        (f"upsample_{linear}.vec", (x, sizes, False, None)),
        (f"upsample_{linear}.default", (x, sizes, False)),
    ]
    if n > 1:
        found.append((f"_adaptive_avg_pool{n}d.default", (x, [1] * n)))
    if n == 2:
        norm = (bias[:4], bias[:4], bias[:4], bias[:4] ** 2, False, 0.1, 1e-5, False)
        found += [("pixel_shuffle.default", (x, 2)), ("batch_norm.default", (x, *norm))]
        found += [("prelu.default", (x, bias[:4]))]
    return found


LAST = [(f"last.{name}", args) for n in (1, 2, 3) for name, args in _of_images(n)]


@pytest.mark.parametrize(("op", "args"), LAST, ids=lambda x: x if isinstance(x, str) else "")
def test_channels_last_is_torch_with_its_axes_moved(op: str, args: tuple[Any, ...]) -> None:
    _, name, overload = op.split(".")
    theirs = getattr(getattr(torch.ops.aten, name), overload)(*args).numpy()
    arrays = {f"x{i}": a.numpy() for i, a in enumerate(args) if isinstance(a, torch.Tensor)}
    arrays["x0"] = np.moveaxis(arrays["x0"], 1, -1)
    given = [
        Operand(f"x{i}", ArrayType(arrays[f"x{i}"].shape, "float32"))
        if isinstance(a, torch.Tensor) else a
        for i, a in enumerate(args)
    ]  # fmt: skip
    out = ArrayType(np.moveaxis(theirs, 1, -1).shape, "float32")
    text = templates.expression(op, out, given, {})
    assert text is not None
    names = {"jax": jax, "jnp": jnp, "lax": jax.lax, "nnx": nnx, "np": np, **vars(pool_flax)}
    ours = eval(text, names | {k: jnp.asarray(x) for k, x in arrays.items()})
    np.testing.assert_allclose(np.moveaxis(ours, -1, 1), theirs, atol=2e-5)


X = Operand("x", ArrayType((3, 4), "float32"))
DRAWN: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("aten.randn.default", ([3, 4],), {"dtype": Dtype("float32")}),
    ("aten.randn.default", ([5],), {}),
    ("aten.rand.default", ([3, 4],), {}),
    ("aten.randn_like.default", (X,), {}),
    ("aten.randn_like.default", (X,), {"dtype": Dtype("float64")}),
    ("aten.rand_like.default", (X,), {}),
    ("aten.normal_functional.default", (X,), {}),
    ("aten.normal_functional.default", (X, 2.0, 0.5), {}),
    ("aten.normal_functional.default", (X, 0.0, 3.0), {}),
    ("aten.uniform.default", (X,), {}),
    ("aten.uniform.default", (X, -1.0, 2.0), {}),
]


@pytest.mark.parametrize(("op", "args", "kwargs"), DRAWN)
def test_what_draws_draws_as_its_rule(op: str, args: Any, kwargs: Any) -> None:
    text = templates.expression(op, ArrayType((3, 4), "float32"), args, kwargs)
    x = jnp.arange(12.0).reshape(3, 4)
    keys = SimpleNamespace(rngs=lambda: jax.random.key(0))
    with jax.enable_x64(True), jax_draws():
        ours = eval(str(text), {"jax": jax, "jnp": jnp, "self": keys, "x": x.astype("float32")})
    given = [x.astype("float32") if a is X else a for a in args]
    named = {k: np.dtype(v.name) for k, v in kwargs.items()}
    with jax.enable_x64(True), jax_draws():
        theirs = table()[op](*given, **named, rng=keys.rngs)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_wrong_expression_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(torch.ops.aten.exp.default, (torch.tensor([1, 2]),), {})
    assert not _wrong(call)
    for text, word in (
        ("jnp.exp({})", "dtype"),
        ("jnp.expm1({}.astype(jnp.float32))", "error"),
        ("jnp.exp(1)", "weakly"),
    ):
        fault = {"aten.exp.default": lambda x, text=text: text.format(x)}
        monkeypatch.setattr(templates, "TEMPLATES", fault)
        assert word in _wrong(call)


# -- how they read ------------------------------------------------------------------------------


def x(*shape: int | str, dtype: str = "float32", text: str = "x") -> Operand:
    return Operand(text, ArrayType(shape, dtype))


B, T = SizeText("B", "s0"), SizeText("T", "s1")
HALF = SizeText("x.shape[2] // 2", "s1 // 2")
I = x(3, dtype="int64", text="i")  # noqa: E741
M = x(2, 3, dtype="bool", text="mask")

READS: list[tuple[str, list[Any], dict[str, Any], str | None]] = [
    ("view", [x("s0", "s1", 768), [B, T, 12, 64]], {}, "x.reshape(B, T, 12, 64)"),
    ("view", [x("s0", "s1", 768), ["B*T", 768]], {}, "x.reshape(-1, 768)"),
    ("view", [x("s0", 4, "s1"), [B, 4, 2, HALF]], {}, "x.reshape(B, 4, 2, -1)"),
    ("view", [x(2, 3), [2, 3]], {}, "x"),
    ("permute", [x(2, 3, 4, 5), [0, 2, 1, 3]], {}, "x.transpose(0, 2, 1, 3)"),
    ("transpose.int", [x(2, 3, 4), 1, 2], {}, "x.swapaxes(1, 2)"),
    ("transpose.int", [x(2, 3), 0, 1], {}, "x.T"),
    ("linear", [x(2, 3), x(4, 3, text="w"), x(4, text="b")], {}, "x @ w.T + b"),
    ("gelu", [x(3)], {"approximate": "none"}, "jax.nn.gelu(x, approximate=False)"),
    ("softmax.int", [x(2, 3), -1], {}, "jax.nn.softmax(x, axis=-1)"),
    ("softmax.int", [x(2, 3, dtype="float16"), -1, Dtype("float32")], {},
     "jax.nn.softmax(x.astype(jnp.float32), axis=-1)"),
    ("masked_fill.Scalar", [x(2, 3), M, -math.inf], {}, "jnp.where(mask, (-jnp.inf), x)"),
    ("slice.Tensor", [x(2, "s0"), 1, 1, 2**63 - 1], {}, "x[:, 1:]"),
    ("slice.Tensor", [x(2, 9), 1, 0, T], {}, "x[:, :T]"),
    ("select.int", [x(2, 3, 4), 1, 0], {}, "x[:, 0]"),
    ("select.int", [x(2, 3, 4), -1, 0], {}, "x[..., 0]"),
    ("unsqueeze", [x(2, 3), 0], {}, "x[None]"),
    ("unsqueeze", [x(2, 3), -1], {}, "x[..., None]"),
    ("cat", [[x(2, 3, text="a"), x(2, 4, text="b")], 1], {}, "jnp.concatenate([a, b], axis=1)"),
    ("mean.dim", [x(2, 3, 4, 5), [2, 3]], {}, "x.mean(axis=(2, 3))"),
    ("mean.dim", [x(2, 3), [-1], True], {}, "x.mean(axis=-1, keepdims=True)"),
    ("bmm", [x(2, 3, 4, text="a"), x(2, 4, 5, text="b")], {}, "a @ b"),
    ("_to_copy", [x(2)], {"dtype": Dtype("int64")}, "x.astype(int)"),
    ("_to_copy", [x(2)], {"dtype": Dtype("bfloat16")}, "x.astype(jnp.bfloat16)"),
    ("split.Tensor", [x(2, 9), 3, -1], {}, "jnp.split(x, 3, axis=-1)"),
    ("split.Tensor", [x(2, 8), 3, 1], {}, "jnp.split(x, [3, 6], axis=1)"),
    ("unbind.int", [x(2, 9)], {}, "jnp.unstack(x, axis=0)"),
    ("mul.Tensor", [I, 0.5], {}, "i.astype(jnp.float32) * 0.5"),
    ("mul.Tensor", [I, x(3)], {}, "i * x"),
    ("add.Tensor", [x(3), x(dtype="float64", text="y")], {}, "x + y.astype(jnp.float32)"),
    ("add.Tensor", [x(3), x(3, text="y")], {"alpha": 2}, "x + (2 * y)"),
    ("rsub.Scalar", [x(3), 1.0], {}, "1.0 - x"),
    ("pow.Tensor_Scalar", [x(3), 2], {}, "x ** 2"),
    ("arange", [T], {}, "jnp.arange(T)"),
    ("expand", [x("s0", 1), [-1, T]], {}, "jnp.broadcast_to(x, ((x.shape[0]), T))"),
    ("index.Tensor", [x(2, 9), [None, I]], {}, "x[:, i]"),
    ("index.Tensor", [x(2, 3), [M]], {}, None),
    ("embedding", [x(9, 4, text="w"), I, 0], {}, None),
    ("grid_sampler", [x(1, 2, 3, 3)], {}, None),
]  # fmt: skip


@pytest.mark.parametrize("case", READS, ids=lambda c: f"{c[0]}: {c[3]}")
def test_how_an_operation_reads(case: tuple[str, list[Any], dict[str, Any], str | None]) -> None:
    name, args, kwargs, wanted = case
    args = [[SizeText("B * T", "s0*s1"), 768] if a == ["B*T", 768] else a for a in args]
    op = f"aten.{name}" if "." in name else f"aten.{name}.default"
    assert expression(op, None, args, kwargs) == wanted


# -- rules as text ------------------------------------------------------------------------------


def _ran(ops: list[str]) -> tuple[Any, dict[str, Any]]:
    """The text of rules, and what it defines: it imports nothing of ours."""
    made = written(ops)
    text = "\n".join([*made.imports, made.source])
    assert "convert" not in text.replace("convert_element_type", "").replace("bitcast_convert", "")
    names: dict[str, Any] = {}
    exec(compile(text, "port", "exec"), names)
    return made, names


def test_every_rule_stands_alone() -> None:
    done = set()
    for op, rule in table().items():
        if rule.function not in done:
            done.add(rule.function)
            made, names = _ran([op])
            assert callable(eval(made.functions[op], names))


@pytest.mark.parametrize(
    "op",
    ["upsample_bicubic2d.vec", "var_mean.correction", "erfinv.default", "max_pool2d.default",
     "triplet_margin_loss.default", "gru.input", "scatter_reduce.two", "pad.default"],
)  # fmt: skip
def test_a_written_rule_gives_what_the_rule_gives(op: str) -> None:
    name = f"aten.{op}"
    overload, text = next(c[1:] for c in [*rules.SWEPT, *rules.OTHERS] if c[0] == name)
    call = next(rules._calls(overload, text))
    made, names = _ran([name])
    rule = table()[name]
    with jax.enable_x64(True):
        args, kwargs = tree_map(to_jax, (call.args, call.kwargs))
        extra = {"rng": None} if rule.random else {}
        ours = eval(made.functions[name], names)(*args, **kwargs, **extra)
        theirs = rule(*args, **kwargs, **extra)
    assert not compare(ours, tree_map(lambda v: torch.from_numpy(np.array(v)), theirs))


def test_rules_together_have_names_of_their_own() -> None:
    made, names = _ran(list(table()))
    for op in table():
        assert callable(eval(made.functions[op], names))
    assert (
        made.functions["aten.upsample_bilinear2d.vec"]
        != made.functions["aten.upsample_bilinear2d.default"]
    )
    taken = written(["aten.pixel_shuffle.default"], taken=["pixel_shuffle"])
    assert "pixel_shuffle" not in taken.names


def test_how_a_written_rule_is_called() -> None:
    made = written(["aten.to.dtype", "aten.dropout.default", "aten.pad.default"])
    assert made.call("aten.to.dtype", None, [x(3), Dtype("float16")], {}) == (
        "to_dtype(x, jnp.float16)"
    )
    assert made.call("aten.dropout.default", None, [x(3), 0.5, True], {}) == (
        "dropout(x, 0.5, True, rng=self.rngs)"
    )
    assert made.call("aten.dropout.default", None, [x(3), 0.5, False], {}).endswith("rng=None)")
    called = made.call("aten.pad.default", None, [x(3), [1, B], "constant", -math.inf], {})
    assert called == "pad(x, [1, B], 'constant', -jnp.inf)"


def test_a_rule_without_source_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZooError, match="no rule"):
        written(["aten.no_such_thing.default"])
    names: dict[str, Any] = {"__name__": "convert.typed_in"}
    exec("def typed(x): return x", names)
    monkeypatch.setitem(RULES, "own.typed.default", Rule("own.typed.default", names["typed"]))
    with pytest.raises(ZooError, match="source is not at hand"):
        written(["own.typed.default"])
