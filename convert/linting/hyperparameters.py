"""Hyper-parameters that are known to be read differently by frameworks and implementations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from convert.linting.ambiguous import CONV
from convert.linting.findings import Finding
from convert.linting.subject import Layer, Subject
from convert.linting.tokens import TOKENS
from convert.linting.values import UNKNOWN, count, finding, severity, value
from zoo.checkpoint.problems import dims

_EPSILON = (
    *("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "layernorm_eps", "ln_eps"),
    *("rms_norm_eps", "rms_norm_epsilon", "norm_eps", "norm_epsilon", "group_norm_eps"),
    *("batch_norm_eps", "batch_norm_epsilon", "bn_eps", "epsilon", "eps"),
)
_ACTIVATION = (
    *("hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "act_fn"),
    *("feed_forward_proj", "activation", "nonlinearity"),
)
_TRANSFORMER = re.compile(r"attn|attention", re.I)


def parameters(s: Subject) -> Iterator[Finding]:
    """Every finding about a hyper-parameter of one checkpoint."""
    for rule in _RULES:
        yield from rule(s)


def model_type(s: Subject) -> Iterator[Finding]:
    if s.foreign is not None:
        yield finding(
            *("model-type", "check", f"names are of {s.title}, the config is of {s.foreign}"),
            "models that share their names compute different things: RoBERTa has BERT's, and "
            "counts positions from another number",
            "take the definition that the config names; to `zooconvert` this is the other one",
        )


def epsilon(s: Subject) -> Iterator[Finding]:
    for kind, what, why in (
        (
            "norm",
            "LayerNorm, GroupNorm or RMSNorm",
            "LayerNorm and GroupNorm default to 1e-5 in PyTorch and 1e-6 in Flax, RMSNorm to the "
            "dtype's resolution and 1e-6; BERT has 1e-12",
        ),
        ("batchnorm", "BatchNorm", "both frameworks default to 1e-5; published models differ"),
    ):
        layers = s.kinds(kind)
        if layers:
            here, weight = value(s, _EPSILON)
            yield finding(
                *("epsilon", weight, f"{what}: {here}", why),
                "pass it to every norm of both sides; `zooconvert verify A B --level outputs` "
                "finds another epsilon and names it",
                layers,
            )


def norm_variance(s: Subject) -> Iterator[Finding]:
    layers = s.kinds("norm", "batchnorm")
    if layers:
        yield finding(
            *("norm-variance", severity(s), count(layers, "norm")),
            "Flax's norms default to use_fast_variance=True, E[x²] - E[x]²: at a mean of 10 that "
            "is 33 (LayerNorm) and 81 (BatchNorm) times the rounding noise",
            "set use_fast_variance=False in every Flax norm",
            layers,
        )


def batchnorm(s: Subject) -> Iterator[Finding]:
    layers = s.kinds("batchnorm")
    if not layers:
        return
    here, weight = value(s, ("batch_norm_momentum", "bn_momentum", "momentum"))
    yield finding(
        *("batchnorm-momentum", weight, here),
        "it is the complement: PyTorch's 0.1 is Flax's 0.9, and Flax defaults to 0.99",
        "if it trains on, set momentum=1 - PyTorch's in Flax; in eval mode it does nothing",
        layers,
    )
    yield finding(
        *("batchnorm-variance", severity(s), count(layers, "running variance")),
        "PyTorch updates running_var with the unbiased variance of the batch, Flax with the "
        "biased: n/(n-1) apart at every step",
        "if it trains on, give the Flax side PyTorch's update (zoo.nn.batchnorm_flax has it)",
        layers,
    )


def gelu(s: Subject) -> Iterator[Finding]:
    found = s.find(*_ACTIVATION)
    why = (
        "PyTorch's GELU defaults to erf, jax.nn.gelu and flax's to tanh; transformers calls erf "
        "'gelu' and tanh 'gelu_new' or 'gelu_pytorch_tanh'; 5e-4 a layer apart"
    )
    check = "pass approximate= to the Flax one: False for erf, True for tanh"
    if found and "gelu" in str(found[1]).lower():
        flavour = str(found[1]).lower()
        tanh = any(word in flavour for word in ("new", "tanh", "fast", "approx", "gated"))
        kind = "x·sigmoid(1.702x)" if "quick" in flavour else "tanh" if tanh else "erf"
        yield finding("gelu", severity(s), f"{found[1]} ({found[0]}): by {kind}", why, check)
    elif found is None and any(_TRANSFORMER.search(x.name) for x in s.layers):
        fields = s.unknown & set(_ACTIVATION)
        if fields or not s.ours:
            where = f" ({', '.join(sorted(fields))})" if fields else ""
            yield finding("gelu", "check", f"activation {UNKNOWN}{where}", why, check)


def convolutions(s: Subject) -> Iterator[Finding]:
    layers = [x for x in s.kinds(*CONV) if any(k > 1 for k in x.weight[2:])]
    if layers:
        here, weight = value(s, ("padding", "stride"))
        yield finding(
            *("conv-padding", weight, here),
            "with a stride, Flax's 'SAME' pads the end more than the start, PyTorch's padding=k//2 "
            "both alike: the same shape, other values. Flax defaults to 'SAME', PyTorch to none",
            "give Flax the numbers: padding=((p, p), (p, p)); pools too",
            layers,
        )
    transposed = s.kinds("conv_transpose")
    if transposed:
        yield finding(
            *("conv-transpose", severity(s), count(transposed, "layer") + ", by name or shape"),
            "PyTorch stores (in, out, *kernel) and correlates with the flipped kernel; Flax's "
            "ConvTranspose does not flip unless transpose_kernel=True, and pads otherwise",
            "flip the spatial axes or set transpose_kernel=True, and compare outputs",
            transposed,
        )


def flatten_order(s: Subject) -> Iterator[Finding]:
    convs = s.kinds(*CONV)
    made = {n for x in s.layers for n in (x.weight[:1], x.weight[-1:]) if x.kind == "embedding"}
    made |= {x.weight[:1] for x in s.layers if x.kind != "embedding"}
    read: dict[str, tuple[Layer, tuple[int, ...]]] = {}
    for layer in s.kinds("linear"):
        # What another layer gives as it is was not flattened.
        guess = None if layer.weight[1:2] in made else _read_as(layer.weight[-1], convs)
        if sizes := layer.flattened or guess:
            read[layer.name] = layer, sizes
    if read:
        readings = dict.fromkeys(f"{x.weight[1]} = {dims(sizes)}" for x, sizes in read.values())
        yield finding(
            *("flatten-order", severity(s), f"inputs (C, H, W): {'; '.join(readings)}"),
            "PyTorch flattens an image channel first, Flax as it lies, channel last: the columns "
            "of the weight then stand in another order, in the same shape",
            "transpose the image to channel first before it is flattened in Flax, or reorder the "
            "weight (the layout op `reorder`; `flat_linear` in zoo.layout)",
            [x for x, _ in read.values()],
        )


def _read_as(inputs: int, convs: Sequence[Layer]) -> tuple[int, ...] | None:
    """(C, H, W) or (C, H W) of the output of a convolution, flattened, if it can be that."""
    channels = max((x.weight[0] for x in convs if inputs % x.weight[0] == 0), default=inputs)
    spatial = inputs // channels
    if channels < 2 or spatial < 2:
        return None
    side = round(spatial**0.5)
    return (channels, side, side) if side * side == spatial else (channels, spatial)


def linear_order(s: Subject) -> Iterator[Finding]:
    layers = s.kinds("linear_in_out")
    if layers:
        yield finding(
            *("linear-order", "check", count(layers, "layer") + ", by the length of the bias"),
            "these weights are stored (in, out), as by transformers' Conv1D in GPT-2: the same as "
            "a Flax kernel, where nn.Linear's is its transpose",
            "do not transpose them on the way to Flax; the square ones among them do not show it",
            layers,
        )


def recurrent(s: Subject) -> Iterator[Finding]:
    layers = s.kinds("recurrent")
    gates = s.kinds("gate")
    if not layers and not gates:
        return
    kinds = sorted({_CELLS.get(n, f"{n} gates") for n in map(_gates, layers) if n})
    here = f"{', '.join(kinds)}, stacked" if kinds else "one matrix a gate (Flax's cells)"
    yield finding(
        *("gate-order", severity(s), here),
        "PyTorch stacks the LSTM's gates as i, f, g, o and the GRU's as r, z, n; Keras and ONNX in "
        "another order, Flax's cells keep a matrix a gate; any order has the same shape",
        "split in the source's order; compare the outputs of several steps",
        layers or gates,
    )
    yield finding(
        *("two-biases", severity(s), "bias_ih and bias_hh" if layers else "one bias a gate"),
        "PyTorch has two biases to a gate, Flax one (two for a GRU's n): summed, they cannot be "
        "parted again; a GRU's n must not be summed, the reset gate multiplies its hidden one",
        "keep both where the weights shall come back or train on",
        layers or gates,
    )


_CELLS = {1: "RNN", 3: "GRU", 4: "LSTM"}


def _gates(layer: Layer) -> int:
    shape = next((x for n, x in layer.shapes.items() if n.startswith("weight_hh")), (0, 0))
    return shape[0] // shape[1] if len(shape) == 2 and shape[1] else 0


def dropout(s: Subject) -> Iterator[Finding]:
    rates = {
        k: v
        for k, v in s.config.items()
        if ("dropout" in k or "drop_path" in k or k.endswith(("_pdrop", "zoneout")))
        and isinstance(v, int | float)
        and v > 0
    }
    if rates:
        listed = ", ".join(f"{k} {v:g}" for k, v in rates.items())
        yield finding(
            *("dropout", "note", listed),
            "torch modules start in training mode, NNX modules too, Linen asks each call",
            "model.eval() on both sides, or deterministic=True, before outputs are compared",
        )


_RULES = (
    *(model_type, epsilon, norm_variance, batchnorm, gelu, convolutions, flatten_order),
    *(linear_order, *TOKENS, recurrent, dropout),
)
