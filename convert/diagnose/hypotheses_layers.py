"""Why a linear layer, an embedding or a convolution gives something else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from convert.diagnose.case import Candidates, Case, first_fit, tensors_of
from convert.diagnose.causes import Reason, found


def linear(case: Case) -> Reason | None:
    """nn.Linear."""
    return first_fit(case, _bias, _transposed)


def _bias(case: Case) -> Candidates:
    if (bias := tensors_of(case.module).get("bias")) is None:
        return
    for factor, reason in (
        (0.0, found("bias_missing", tensor="bias")),
        (2.0, found("bias_twice", tensor="bias")),
        (-1.0, found("bias_negated", tensor="bias")),
    ):
        yield case.variant(tensors={"bias": bias * factor}), reason


def _transposed(case: Case) -> Candidates:
    weight = tensors_of(case.module).get("weight")
    if weight is not None and weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
        made = case.variant(tensors={"weight": weight.T})
        yield made, found("transposed", "kernel", tensor="weight")


def embedding(case: Case) -> Reason | None:
    """nn.Embedding."""
    return first_fit(case, _other_rows)


def _other_rows(case: Case) -> Candidates:
    """Rows read at another offset."""
    own, call = tensors_of(case.module).get("weight"), case.call
    if own is None or call is None:
        return
    ids = next((v for v in call.inputs.values() if v.dtype.kind in "iu"), None)
    if ids is None:
        return
    for k in (1, -1, 2, -2):
        shifted = ids + k
        if shifted.min() >= 0 and shifted.max() < len(own):
            yield own[shifted], found("offset", "rows", offset=k)


def convolution(case: Case) -> Reason | None:
    """nn.Conv1d to Conv3d."""
    return first_fit(case, _bias, _padding, _kernels, _strides, _dilations)


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
    x = case.input()
    if x is None:
        return
    now = torch_pads(case)
    for word, pads in _paddings(case, x.shape[2:]).items():
        yield (
            _conv(case, pads=pads),
            found("padding", torch=_show(now), word=word, flax=_show(pads), pads=now),
        )
    for mode in ("circular", "reflect", "replicate"):
        yield _conv(case, pads=now, mode=mode), found("padding", "mode", mode=mode)


def _paddings(case: Case, image: tuple[int, ...]) -> dict[str, list[tuple[int, int]]]:
    """What Flax may put before and after each axis of the image, by its name."""
    m, n = case.module, len(image)
    sizes = list(zip(image, m.kernel_size, m.stride, m.dilation, strict=True))
    spans = [d * (k - 1) for _, k, _, d in sizes]
    totals = [max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0) for n, k, s, d in sizes]
    named = {
        "SAME": [(t // 2, t - t // 2) for t in totals],
        "VALID": [(0, 0)] * n,
        "CAUSAL": [(t, 0) for t in spans],
        "anti-causal": [(0, t) for t in spans],
        "half the kernel": [(t // 2, t // 2) for t in spans],
        "SAME, the extra one before": [(t - t // 2, t // 2) for t in totals],
    }
    said = case.flax.get("padding")
    if isinstance(said, int):
        named[str(said)] = [(said, said)] * n
    elif isinstance(said, list | tuple):
        named[str(said)] = [(p, p) if isinstance(p, int) else tuple(p) for p in said]
    return named


def _show(pads: Any) -> str:
    return " and ".join(f"{a} before, {b} after" for a, b in dict.fromkeys(map(tuple, pads)))


def _kernels(case: Case) -> Candidates:
    now = torch_pads(case)
    w = case.module.weight.detach()
    yield (
        _conv(case, pads=now, weight=w.flip(tuple(range(2, w.ndim)))),
        found("flipped", "convolution", tensor="weight"),
    )
    if w.ndim == 4 and w.shape[2] == w.shape[3]:
        made = _conv(case, pads=now, weight=w.mT.contiguous())
        yield made, found("transposed", "image", tensor="weight")
    if w.shape[0] == w.shape[1]:
        made = _conv(case, pads=now, weight=w.transpose(0, 1).contiguous())
        yield made, found("transposed", "channels", tensor="weight")


def _strides(case: Case) -> Candidates:
    for new, made in _others(case, "stride"):
        yield made, found("stride", torch=case.module.stride, flax=new)


def _dilations(case: Case) -> Candidates:
    for new, made in _others(case, "dilation"):
        yield made, found("dilation", torch=case.module.dilation, flax=new)


def _others(case: Case, name: str) -> Iterator[tuple[tuple[int, ...], np.ndarray | None]]:
    """Other values of a setting, with torch's pads and with causal ones."""
    m, now = case.module, torch_pads(case)
    for v in (1, 2, 3, 4):
        new = (v,) * len(m.kernel_size)
        if new != getattr(m, name):
            for pads in (now, [(v * (k - 1), 0) for k in m.kernel_size]):
                yield new, _conv(case, pads=pads, **{name: new})


def transposed_convolution(case: Case) -> Reason | None:
    """nn.ConvTranspose1d to 3d."""
    return first_fit(case, _bias, _not_flipped, _cut)


def _flip(case: Case) -> dict[str, np.ndarray]:
    w = tensors_of(case.module)["weight"]
    return {"weight": np.flip(w, tuple(range(2, w.ndim))).copy()}


def _not_flipped(case: Case) -> Candidates:
    yield (
        case.variant(tensors=_flip(case)),
        found("flipped", "transposed convolution", tensor="weight"),
    )


def _cut(case: Case) -> Candidates:
    """Other parts of the full transposed convolution, with its kernel as it is and flipped."""
    m = case.module
    n = len(m.kernel_size)
    full = {"padding": (0,) * n, "output_padding": (0,) * n}
    reach = [range(k + s) for k, s in zip(m.kernel_size, m.stride, strict=True)]
    whole = case.variant(full), case.variant(full, _flip(case))
    wanted = {t.shape[2:] for t in case.targets if t.ndim == n + 2}
    for shape, flip in itertools.product(wanted, (False, True)):
        for cut in itertools.product(*reach):
            inside = tuple(slice(c, c + size) for c, size in zip(cut, shape, strict=True))
            made = whole[flip]
            if made is None or made[:, :, *inside].shape[2:] != shape:
                continue
            if flip and cut == tuple(m.padding):
                why = found("flipped", "transposed convolution", tensor="weight")
            elif flip:
                why = found("padding", "transposed, not flipped", flax=cut, torch=tuple(m.padding))
            else:
                why = found("padding", "transposed", flax=cut, torch=tuple(m.padding))
            yield made[:, :, *inside], why
