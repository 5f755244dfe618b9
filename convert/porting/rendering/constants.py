"""A constant array as the expression that somebody would have written for it.

Every expression is NumPy's, and is evaluated: what it gives is the array, bit for bit, or it is not
used. torch computes tables in float32 by functions of its own, so a table of sines or a window that
torch made is rarely one of NumPy's: it is stored then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from convert.porting.rendering.relative_indices import relative_indices, subject

_LITERAL = 32  # numbers
_LINE = 100  # characters: what is longer gets a line for each number
_NATIVE = "?bBhHiIlLqQefdFD"


def array_text(a: np.ndarray) -> str | None:
    """Python that gives exactly this array, its dtype included; None: there is no short one.

    It needs `np`; for bfloat16 and FP8 `jnp` too.
    """
    if a.dtype.char not in _NATIVE:
        if a.dtype.kind != "V" and a.dtype.itemsize > 2:
            return None
        wide = array_text(a.astype(np.float32))
        text = None if wide is None else f"{wide}.astype(jnp.{a.dtype.name})"
        return text if text and _gives(text, a) else None
    for text in _texts(a):
        if _gives(text, a):
            return text
    return None


def _gives(text: str, a: np.ndarray) -> bool:
    """Whether the expression, which is one of ours, is this array."""
    names = {"np": np}
    if "jnp." in text:
        import jax.numpy as jnp

        names["jnp"] = jnp
    try:
        with np.errstate(all="ignore"):
            made = np.asarray(eval(text, names))
    except (ValueError, OverflowError, MemoryError):
        return False
    return made.dtype == a.dtype and made.shape == a.shape and made.tobytes() == a.tobytes()


def _texts(a: np.ndarray) -> Iterator[str]:
    """Expressions to try, the plainest first."""
    if _is_filled(a):
        yield from _filled(a)
    if a.size <= 2:
        yield literal(a)
    if 1 in a.shape:
        yield from _with_single_axes(a)
    if a.ndim == 1 and a.size > 1:
        yield from ranges(a)
        yield from _frequencies(a)
        yield from _windows(a)
        yield from _flattened(a)
    if a.ndim == 2:
        yield from _matrices(a)
        yield from _waves(a)
    if a.ndim > 1 and a.size > 2:
        yield from (f"{subject(t)}.reshape{a.shape}" for t in ranges(a.reshape(-1), counts=True))
    if a.size <= _LITERAL and len(text := literal(a)) <= _LINE:
        yield text
    yield from _repeated(a)


def dtype_text(dtype: np.dtype) -> str:
    """`np.float32`; `bool`."""
    return "bool" if dtype.kind == "b" else f"np.{dtype.name}"


def _typed(a: np.ndarray, usual: type) -> str:
    """The dtype as a last argument; nothing where it would be this one anyway."""
    return "" if a.dtype == usual else f", {dtype_text(a.dtype)}"


def number(value: object) -> str:
    """A number as Python's: the shortest that gives it in its dtype."""
    x = np.asarray(value)
    if x.dtype.kind in "fc" and not np.isfinite(x):
        return {"inf": "np.inf", "-inf": "-np.inf"}.get(str(x.item()), "np.nan")
    if x.dtype.kind == "f" and x == np.finfo(x.dtype).min:
        return f"np.finfo({dtype_text(x.dtype)}).min"
    return str(x[()]).replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def literal(a: np.ndarray) -> str:
    """Every number; in the dtype where Python's would be another."""

    def nested(x: np.ndarray) -> str:
        if not x.ndim:
            return number(x)
        return f"[{', '.join(nested(part) for part in x)}]"

    usual = {"b": bool, "i": np.int64, "f": np.float64, "c": np.complex128}.get(a.dtype.kind, bool)
    return f"np.array({nested(a)}{_typed(a, usual)})"


def _is_filled(a: np.ndarray) -> bool:
    """Whether there is one value, and it is shorter to say so."""
    if a.size < 2:
        return a.size == 0 or (a.ndim > 0 and a.flat[0] in (0, 1))
    return bool((a == a.flat[0]).all()) or (a.dtype.kind == "f" and bool(np.isnan(a).all()))


def _filled(a: np.ndarray) -> Iterator[str]:
    shape = str(a.shape[0]) if a.ndim == 1 else str(a.shape)
    yield f"np.zeros({shape}{_typed(a, np.float64)})"
    if a.size:
        yield f"np.ones({shape}{_typed(a, np.float64)})"
        usual = {"b": bool, "i": np.int64, "f": np.float64}.get(a.dtype.kind, bool)
        yield f"np.full({shape}, {number(a.flat[0])}{_typed(a, usual)})"


def _with_single_axes(a: np.ndarray) -> Iterator[str]:
    """`x[None]`, `x[:, None]`: the text of what has no axes of size 1."""
    inner = array_text(np.ascontiguousarray(a.squeeze()))
    if inner is None or a.size == 1:
        return
    places = ["None" if n == 1 else ":" for n in a.shape]
    while places[-1] == ":":
        places.pop()
    yield f"{subject(inner)}[{', '.join(places)}]"


def _flattened(a: np.ndarray) -> Iterator[str]:
    """A square matrix of relative positions, row after row."""
    n = math.isqrt(a.size)
    if a.dtype.kind == "i" and n * n == a.size and n >= 4:
        for text in relative_indices(a.reshape(n, n)):
            yield f"{subject(text)}.reshape(-1)"


def _repeated(a: np.ndarray) -> Iterator[str]:
    """Rows that are all the same, or columns."""
    for axis in range(a.ndim):
        first = a.take([0], axis)
        if a.shape[axis] > 1 and a.size > 2 and (a == first).all():
            inner = array_text(np.ascontiguousarray(first))
            if inner is not None:
                yield f"np.repeat({inner}, {a.shape[axis]}, axis={axis})"
            return


# -- ranges -------------------------------------------------------------------------------------


def ranges(a: np.ndarray, counts: bool = False) -> Iterator[str]:
    """arange; unless only `counts` are wanted its multiples and fractions too, and linspace."""
    if a.dtype.kind not in "iuf" or not np.isfinite(a).all():
        return
    n = a.size
    start, step = a[0].item(), a[1].item() - a[0].item()
    dtype = "" if a.dtype == np.int64 else f", dtype={dtype_text(a.dtype)}"
    if step and int(step) == step and int(start) == start:
        start, step = int(start), int(step)
        stop = start + n * step
        yield _arange(start, stop, step, dtype)
    if a.dtype.kind != "f" or not step or counts:
        return
    spaced = dtype if a.dtype != np.float64 else ""
    even = [
        f"np.linspace({first}, {number(a[-1])}, {n}{spaced})"
        for first in dict.fromkeys((number(a[0]), f"{a[0]:.6g}"))
    ]
    if a[-1] == int(a[-1]):
        yield from even
    whole = f"np.arange({n}{dtype})"
    for shift in ("", " + 0.5", " + 1"):
        base = f"({whole}{shift})" if shift else whole
        for m in (n, n - 1, n + 1):
            yield f"{base} / {m}"
            yield f"{base} / {m} * 2 - 1"
            yield f"{base} * 2 / {m} - 1"
    if not start:
        yield f"{whole} * {number(a[1])}"
        yield f"{whole} / {number(a.dtype.type(1) / a[1])}"
        yield f"(np.arange({n}) * {number(a[1])}).astype({dtype_text(a.dtype)})"
    yield from even


def _arange(start: int, stop: int, step: int, dtype: str) -> str:
    if step == 1:
        return f"np.arange({f'{start}, ' if start else ''}{stop}{dtype})"
    if step == -1 and stop == -1:
        return f"np.arange({start + 1}{dtype})[::-1]"
    return f"np.arange({start}, {stop - step + (1 if step > 0 else -1)}, {step}{dtype})"


# -- tables -------------------------------------------------------------------------------------


def _frequencies(a: np.ndarray) -> Iterator[str]:
    """base ** (-2i / d), as rotary positions and sinusoids have it; base is a round number."""
    if a.dtype.kind != "f" or a.size < 4 or not np.isfinite(a).all() or a[0] != 1 or a[-1] <= 0:
        return
    m, d = a.size, 2 * a.size
    last = float(a[-1])
    single = a.dtype == np.float32
    for base in _bases(last ** (-m / (m - 1))):
        cast = ".astype(np.float32)" if single else ""
        if single:
            # As torch computes it: every step in float32, each rounded rightly.
            yield (
                f"1 / (np.float64({base}) ** (np.arange(0, {d}, 2, dtype=np.float32) / {d}))"
                ".astype(np.float32)"
            )
            yield f"1 / {base} ** (np.arange(0, {d}, 2, dtype=np.float32) / {d})"
            rate = f"np.float32(-np.log({base}) / {d})"
            steps = f"np.arange(0, {d}, 2, dtype=np.float32) * {rate}"
            yield f"np.exp({steps}, dtype=np.float64).astype(np.float32)"
            yield f"np.exp({steps})"
        for text in (
            f"1 / {base} ** (np.arange(0, {d}, 2) / {d})",
            f"{base} ** -(np.arange(0, {d}, 2) / {d})",
            f"np.exp(np.arange(0, {d}, 2) * (-np.log({base}) / {d}))",
        ):
            yield f"({text}){cast}" if cast else text
    for base, over in [
        *((b, m - 1) for b in _bases(1 / last)),
        *((b, m) for b in _bases(last ** (-m / (m - 1)))),
    ]:  # timesteps of diffusion models
        count = f"np.arange({m}, dtype=np.float32)"
        if single:
            for steps in (
                f"{count} * np.float32(-np.log({base}) / {over})",
                f"np.float32(-np.log({base})) * {count} / {over}",
            ):
                yield f"np.exp({steps}, dtype=np.float64).astype(np.float32)"
                yield f"np.exp({steps})"
        text = f"np.exp(np.arange({m}) * (-np.log({base}) / {over}))"
        yield f"{text}.astype(np.float32)" if single else text


def _bases(estimate: float) -> list[str]:
    """Round numbers near an estimate."""
    if not 1 < estimate < 1e12:
        return []
    rounded = (float(f"{estimate:.{k}g}") for k in (1, 2, 3, 4, 5))
    near = dict.fromkeys(r for r in rounded if abs(r / estimate - 1) < 1e-3)
    return [f"{b:.1f}" for b in near]


def _windows(a: np.ndarray) -> Iterator[str]:
    """Windows of a Fourier transform."""
    if a.dtype.kind != "f" or a.size < 4:
        return
    n = a.size
    cast = "" if a.dtype == np.float64 else f".astype({dtype_text(a.dtype)})"
    for name in ("hanning", "hamming", "blackman"):
        yield f"np.{name}({n}){cast}"
        yield f"np.{name}({n + 1})[:-1]{cast}"
    for text in (
        f"0.5 - 0.5 * np.cos(2 * np.pi * np.arange({n}) / {n})",
        f"0.5 * (1 - np.cos(2 * np.pi * np.arange({n}) / {n}))",
        f"np.sin(np.pi * np.arange({n}) / {n}) ** 2",
    ):
        yield f"({text}){cast}" if cast else text


def _waves(a: np.ndarray) -> Iterator[str]:
    """Sines and cosines of positions (rows), in turn or one after the other."""
    rows, d = a.shape
    if a.dtype.kind != "f" or rows < 2 or d < 4 or d % 2 or not (np.abs(a) <= 1).all():
        return
    cast = "" if a.dtype == np.float64 else f".astype({dtype_text(a.dtype)})"
    sine, cosine = np.sin(1), np.cos(1)
    first = f"np.arange({rows})[:, None]"
    for rate in (
        f"10000.0 ** (np.arange(0, {d}, 2) / {d})",
        f"10000 ** (2 * (np.arange({d // 2}) / {d}))",
    ):
        angle = f"{first} / {rate}"
        if np.isclose(a[1, 1], cosine, atol=1e-3):
            yield f"np.stack([np.sin({angle}), np.cos({angle})], -1).reshape({rows}, {d}){cast}"
        elif np.isclose(a[1, 0], sine, atol=1e-3):
            yield f"np.concatenate([np.sin({angle}), np.cos({angle})], -1){cast}"
        elif np.isclose(a[1, 0], cosine, atol=1e-3):
            yield f"np.concatenate([np.cos({angle}), np.sin({angle})], -1){cast}"
    exponent = f"np.exp(np.arange(0, {d}, 2) * (-np.log(10000.0) / {d}))"
    if np.isclose(a[1, 1], cosine, atol=1e-3):
        angle = f"{first} * {exponent}"
        yield f"np.stack([np.sin({angle}), np.cos({angle})], -1).reshape({rows}, {d}){cast}"


# -- matrices -----------------------------------------------------------------------------------


def _matrices(a: np.ndarray) -> Iterator[str]:
    """The identity, triangles, relative positions."""
    n, m = a.shape
    shape = f"({n}, {m})"
    values = np.unique(a) if a.dtype.kind in "biuf" else a[:0]
    if a.dtype.kind == "f" and np.isnan(values).any():
        return
    if len(values) == 2:
        if n == m and (a[0, 0] != a[0, 1]):
            yield f"np.eye({n}{_keyword(a, np.float64)})"
        yield from _triangles(a, shape)
    elif a.dtype.kind in "iuf":
        yield from relative_indices(a)


def _keyword(a: np.ndarray, usual: type) -> str:
    return "" if a.dtype == usual else f", dtype={dtype_text(a.dtype)}"


def _triangles(a: np.ndarray, shape: str) -> Iterator[str]:
    """Two values, one below a diagonal and one above."""
    n, m = a.shape
    below, above = a[-1, 0], a[0, -1]
    change = int(np.argmax(a[0] == above)) if below != above else -1
    k = change - 1 if change > 0 else int(-np.argmax(a[:, 0] == below)) if change == 0 else None
    if k is None:
        return
    diagonal = f", {k}" if k else ""
    upper = f", {k + 1}" if k + 1 else ""
    for outer, inner, triangle, which in (
        (above, below, "tril", diagonal),
        (below, above, "triu", upper),
    ):
        if outer == 0:
            usual = np.float64
            full = f"np.full({shape}, {number(inner)}{_typed(a, usual)})"
            full = f"np.ones({shape}{_typed(a, usual)})" if inner == 1 else full
            yield f"np.{triangle}({full}{which})"
    triangle_of_ones = f"np.tri({n}, {m}, {k}, dtype=bool)"
    cast = "" if a.dtype == np.float64 else f".astype({dtype_text(a.dtype)})"
    yield f"np.where({triangle_of_ones}, {number(below)}, {number(above)}){cast}"
