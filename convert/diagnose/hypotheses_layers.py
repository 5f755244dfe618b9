"""Why a linear layer, an embedding or a convolution gives something else."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from convert.diagnose.case import Candidates, Case, Finding, first_fit, tensors_of


def linear(case: Case) -> Finding | None:
    """nn.Linear."""
    return first_fit(case, _bias(case, 1)) or first_fit(case, _transposed(case))


def _bias(case: Case, axis: int) -> Candidates:
    own = tensors_of(case.module)
    if (bias := own.get("bias")) is None:
        return
    for factor, cause, what in (
        (0.0, "bias_missing", "leaves out the bias"),
        (2.0, "bias_twice", "adds the bias twice"),
        (-1.0, "bias_negated", "subtracts the bias"),
    ):
        made = case.variant(tensors={"bias": bias * factor})
        yield made, Finding(cause, f"Flax {what}", "add the bias once", "bias")


def _transposed(case: Case) -> Candidates:
    weight = tensors_of(case.module).get("weight")
    if weight is not None and weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
        yield (
            case.variant(tensors={"weight": weight.T}),
            Finding(
                "transposed",
                "Flax multiplies by the kernel transposed",
                "torch's weight is (out, in), Flax's kernel (in, out): transpose once",
                "weight",
            ),
        )


def embedding(case: Case) -> Finding | None:
    """nn.Embedding: another scale, rows read at another offset."""
    own, call = tensors_of(case.module).get("weight"), case.call
    if own is None or call is None:
        return None
    ids = next((v for v in call.inputs.values() if v.dtype.kind in "iu"), None)
    if ids is None:
        return None

    def offsets() -> Candidates:
        for k in (1, -1, 2, -2):
            shifted = ids + k
            if shifted.min() >= 0 and shifted.max() < len(own):
                yield (
                    own[shifted],
                    Finding("offset", f"Flax looks up rows {k:+d} from torch's",
                            "count ids from the same number"),
                )  # fmt: skip

    return first_fit(case, offsets())


def convolution(case: Case) -> Finding | None:
    """nn.Conv1d to Conv3d."""
    return (
        first_fit(case, _bias(case, 1))
        or first_fit(case, _padding(case))
        or first_fit(case, _kernels(case))
    )


def _conv(case: Case, **changes: Any) -> np.ndarray | None:
    """The convolution with explicit (before, after) pads and other settings."""
    import torch
    import torch.nn.functional as F

    m, x = case.module, case.input()
    if x is None:
        return None
    n = len(m.kernel_size)
    use = {"stride": m.stride, "dilation": m.dilation, "groups": m.groups}
    pads = changes.pop("pads")
    mode = changes.pop("mode", "constant")
    weight = changes.pop("weight", m.weight.detach())
    use |= changes
    flat = [p for pair in reversed(pads) for p in pair]
    try:
        padded = F.pad(torch.from_numpy(x), flat, mode=mode)
        bias = None if m.bias is None else m.bias.detach()
        conv = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
        return conv(padded, weight, bias, **use).numpy()
    except (RuntimeError, ValueError):
        return None


def torch_pads(case: Case) -> list[tuple[int, int]]:
    """What torch puts before and after each axis; a convolution that pads by itself (a causal
    one) is found by its output's size."""
    m = case.module
    if isinstance(m.padding, str):
        totals = [d * (k - 1) * (m.padding == "same") for k, d in zip(m.kernel_size, m.dilation)]  # noqa: B905
        return [(t // 2, t - t // 2) for t in totals]
    pads = [(p, p) for p in m.padding]
    for other in (pads, [(d * (k - 1), 0) for k, d in zip(m.kernel_size, m.dilation)]):  # noqa: B905
        if case.is_right(_conv(case, pads=other)):
            return other
    return pads


def _padding(case: Case) -> Candidates:
    m, x = case.module, case.input()
    if x is None:
        return
    now = torch_pads(case)
    sizes = list(zip(x.shape[2:], m.kernel_size, m.stride, m.dilation, strict=True))
    spans = [d * (k - 1) for _, k, _, d in sizes]
    totals = [max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0) for n, k, s, d in sizes]
    named = {
        "SAME": [(t // 2, t - t // 2) for t in totals],
        "VALID": [(0, 0)] * len(sizes),
        "CAUSAL": [(t, 0) for t in spans],
        "anti-causal": [(0, t) for t in spans],
        "half the kernel": [(t // 2, t // 2) for t in spans],
        "SAME, the extra one before": [(t - t // 2, t // 2) for t in totals],
    }
    said = case.flax.get("padding")
    if isinstance(said, int):
        named[str(said)] = [(said, said)] * len(sizes)
    elif isinstance(said, list | tuple):
        named[str(said)] = [(p, p) if isinstance(p, int) else tuple(p) for p in said]
    for word, pads in named.items():
        yield (
            _conv(case, pads=pads),
            Finding(
                "padding",
                f"torch pads {_show(now)}, Flax's values fit {word}, which is {_show(pads)} here",
                f"padding={now} in the Flax layer",
            ),
        )
    for mode in ("circular", "reflect", "replicate"):
        what = f"Flax pads by the image itself ({mode}), torch by zeros"
        advice = "pad in the same way on both sides"
        yield _conv(case, pads=now, mode=mode), Finding("padding", what, advice)


def _show(pads: Any) -> str:
    return " and ".join(f"{a} before, {b} after" for a, b in dict.fromkeys(map(tuple, pads)))


def _kernels(case: Case) -> Candidates:
    m = case.module
    now = torch_pads(case)
    w = m.weight.detach()
    axes = tuple(range(2, w.ndim))
    advice = "torch's and Flax's convolutions correlate: neither flips its kernel"
    yield (
        _conv(case, pads=now, weight=w.flip(axes)),
        Finding("flipped", "Flax's kernel is flipped along its spatial axes", advice, "weight"),
    )
    if w.ndim == 4 and w.shape[2] == w.shape[3]:
        yield (
            _conv(case, pads=now, weight=w.mT.contiguous()),
            Finding("transposed", "Flax's kernel has its height and width swapped",
                    "permute (out, in, h, w) to (h, w, in, out)", "weight"),
        )  # fmt: skip
    if w.shape[0] == w.shape[1]:
        yield (
            _conv(case, pads=now, weight=w.transpose(0, 1).contiguous()),
            Finding("transposed", "Flax's kernel has its channels in and out swapped",
                    "permute (out, in, ...) to (..., in, out)", "weight"),
        )  # fmt: skip
    for name, values in (("stride", (1, 2, 3, 4)), ("dilation", (1, 2, 3, 4))):
        for v in values:
            new = (v,) * len(axes)
            if new == getattr(m, name):
                continue
            word = f"{name} is {getattr(m, name)} in torch; Flax's values fit {new}"
            for pads in (now, [(v * (k - 1), 0) for k in m.kernel_size]):
                yield (
                    _conv(case, pads=pads, **{name: new}),
                    Finding(name, word, f"the same {name} on both sides"),
                )


def transposed_convolution(case: Case) -> Finding | None:
    """nn.ConvTranspose1d to 3d."""
    own = tensors_of(case.module)
    w = own["weight"]
    n = w.ndim - 2

    def candidates() -> Candidates:
        yield from _bias(case, 1)
        yield (
            case.variant(tensors={"weight": np.flip(w, tuple(range(2, w.ndim))).copy()}),
            Finding(
                "flipped",
                "Flax's kernel is not flipped: torch's transposed convolution wants it so",
                "transpose_kernel=True in Flax, or flip the kernel's spatial axes",
                "weight",
            ),
        )
        kernel, stride = case.module.kernel_size, case.module.stride
        bare = case.variant({"padding": (0,) * n, "output_padding": (0,) * n})
        if bare is None:
            return
        wanted = {t.shape[2:] for t in case.targets if t.ndim == w.ndim}
        for shape, flip in itertools.product(wanted, (False, True)):
            for cut in itertools.product(*(range(k + s) for k, s in zip(kernel, stride))):  # noqa: B905
                inside: list[Any] = [slice(None), slice(None)]
                inside += [slice(c, c + size) for c, size in zip(cut, shape, strict=True)]
                made = bare if not flip else case.variant(
                    {"padding": (0,) * n, "output_padding": (0,) * n},
                    {"weight": np.flip(w, tuple(range(2, w.ndim))).copy()},
                )  # fmt: skip
                if made is None or made[tuple(inside)].shape[2:] != shape:
                    continue
                word = " and its kernel is not flipped" if flip else ""
                yield (
                    made[tuple(inside)],
                    Finding(
                        "padding",
                        f"Flax cuts {cut} off the full transposed convolution, torch "
                        f"{tuple(case.module.padding)}{word}",
                        "give Flax's ConvTranspose explicit padding (k - 1 - p on each side)",
                    ),
                )

    return first_fit(case, candidates())
