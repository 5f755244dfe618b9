"""The kinds of layers, in one table: what each is called in PyTorch, NNX and Linen, which tensors
it has, and how its settings translate.

Layouts, lint, the diagnosis and the pairing of layers all read it. Another package adds rows by an
entry point of group `zooconvert.kinds`, whose value is a `Kind` or several.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from zoo import plugins

Axes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of a layer: its NNX name, the axes of the canonical tensor in NNX's order (None:
    the same), and its Linen collection."""

    nnx: str
    axes: Axes | None = None
    collection: str = "params"


@dataclass(frozen=True, slots=True)
class Attribute:
    """One setting of a layer, as either side calls it.

    `also` are other names for it in torch modules that are not torch.nn's own; `linen` is None
    where Linen has NNX's name and "" where it has no such setting. `how` says what the value of one
    side is on the other: see `to_flax`.
    """

    torch: str
    nnx: str
    linen: str | None = None
    how: Literal["same", "complement", "present", "padding", "single"] = "same"
    also: tuple[str, ...] = ()

    @property
    def torch_names(self) -> tuple[str, ...]:
        """Every name that a torch module may have for it, torch.nn's own first."""
        return (self.torch, *self.also)

    @property
    def flax_names(self) -> tuple[str, ...]:
        """NNX's name and Linen's."""
        return tuple(dict.fromkeys(n for n in (self.nnx, self.linen) if n))

    def to_flax(self, value: Any) -> Any:
        """What Flax wants for torch's value.

        "complement": 1 - value. "present": whether the tensor is there. "padding": numbers become
        (before, after) pairs, "same" becomes "SAME". "single": the one number of a tuple. Raises
        ValueError for what Flax cannot say.
        """
        return _TRANSLATE[self.how][0](value)

    def to_torch(self, value: Any) -> Any:
        """The inverse of `to_flax`; for "present" whether there is such a tensor."""
        return _TRANSLATE[self.how][1](value)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of layer.

    `torch`, `nnx` and `linen` are regular expressions that match whole names of classes; a class is
    of a kind if it or one of its bases has such a name. `leaves` is by the tensor's name in torch.
    """

    name: str
    torch: str = ""
    nnx: str = ""
    linen: str = ""
    compact: str = ""  # what flax.linen calls it inside @nn.compact: Dense_0, Dense_1, ...
    leaves: Mapping[str, Leaf] = field(default_factory=lambda: MappingProxyType({}))
    attributes: tuple[Attribute, ...] = ()
    group: str = ""  # kinds that one Flax class stands for: "conv"; else the name
    only_torchs: bool = False  # a class of that name outside torch.nn is something else

    def __post_init__(self) -> None:
        for pattern in (self.torch, self.nnx, self.linen):
            re.compile(pattern)

    @property
    def flax_group(self) -> str:
        """What a Flax class tells of the kind: "conv" for any number of axes."""
        return self.group or self.name

    def attribute(self, torch: str) -> Attribute:
        """The setting that torch calls `torch`; KeyError if there is none."""
        for a in self.attributes:
            if torch in a.torch_names:
                return a
        raise KeyError(torch)

    def is_torch(self, cls: type) -> bool:
        """Whether a torch class has one of the names; bases are not looked at."""
        named = re.fullmatch(self.torch, cls.__name__) is not None
        return named and (not self.only_torchs or cls.__module__.startswith("torch."))

    def is_flax(self, cls: type) -> bool:
        """Whether an NNX or Linen class has one of the names; bases are not looked at."""
        return any(re.fullmatch(pattern, cls.__name__) for pattern in (self.nnx, self.linen))


_BIAS = Attribute("bias", "use_bias", how="present")
_IN_OUT = (
    Attribute("in_features", "in_features", ""),
    Attribute("out_features", "out_features", "features"),
    _BIAS,
)
_CONV = (
    Attribute("in_channels", "in_features", ""),
    Attribute("out_channels", "out_features", "features"),
    Attribute("kernel_size", "kernel_size"),
    Attribute("stride", "strides"),
    Attribute("padding", "padding", how="padding"),
    Attribute("dilation", "kernel_dilation"),
    _BIAS,
)
_GROUPS = Attribute("groups", "feature_group_count")
_NORM = (
    Attribute("eps", "epsilon", also=("epsilon", "variance_epsilon")),
    Attribute("weight", "use_scale", how="present"),
    _BIAS,
)


def _conv(axes: int) -> Kind:
    spatial = tuple(range(2, 2 + axes))
    return Kind(
        f"conv{axes}d",
        torch=rf"(Lazy)?Conv{axes}d",
        nnx="Conv",
        linen="Conv|ConvLocal",
        compact="Conv",
        leaves={"weight": Leaf("kernel", (*spatial, 1, 0)), "bias": Leaf("bias")},
        attributes=(*_CONV, _GROUPS),
        group="conv",
    )


# In the order in which `canonical_guess` tries the leaves, and classes are tried for a kind.
BUILT_IN = (
    Kind(
        "linear",
        # transformers' Conv1D, of GPT-2, is a linear layer stored (in, out).
        torch=r"Linear|LazyLinear|NonDynamicallyQuantizableLinear|Conv1D",
        nnx="Linear|LinearGeneral",
        linen="Dense|DenseGeneral",
        compact="Dense",
        leaves={"weight": Leaf("kernel", (1, 0)), "bias": Leaf("bias")},
        attributes=_IN_OUT,
    ),
    _conv(1),
    _conv(2),
    _conv(3),
    Kind(
        # Flax's flips no kernel unless transpose_kernel=True: no leaf follows from axes alone.
        "conv_transpose",
        torch=r"(Lazy)?ConvTranspose[123]d",
        nnx="ConvTranspose",
        linen="ConvTranspose",
        attributes=_CONV,
    ),
    Kind(
        "embedding",
        torch="Embedding|EmbeddingBag",
        nnx="Embed",
        linen="Embed",
        compact="Embed",
        leaves={"weight": Leaf("embedding")},
        attributes=(
            Attribute("num_embeddings", "num_embeddings"),
            Attribute("embedding_dim", "features"),
        ),
    ),
    Kind(
        "norm",
        torch=r"LayerNorm|GroupNorm|\w*RMSNorm|\w*LayerNorm|InstanceNorm[123]d",
        nnx=r"\w*LayerNorm|GroupNorm|\w*RMSNorm|InstanceNorm",
        linen=r"\w*LayerNorm|GroupNorm|\w*RMSNorm|InstanceNorm",
        compact="LayerNorm",
        leaves={"weight": Leaf("scale"), "bias": Leaf("bias")},
        attributes=(
            Attribute("normalized_shape", "num_features", "", "single"),
            Attribute("num_channels", "num_features", ""),
            Attribute("num_features", "num_features", ""),
            Attribute("num_groups", "num_groups"),
            *_NORM,
        ),
    ),
    Kind(
        "batchnorm",
        torch=r"_BatchNorm|BatchNorm\w*|SyncBatchNorm",
        nnx="BatchNorm",
        linen="BatchNorm",
        compact="BatchNorm",
        leaves={
            "weight": Leaf("scale"),
            "bias": Leaf("bias"),
            "running_mean": Leaf("mean", collection="batch_stats"),
            "running_var": Leaf("var", collection="batch_stats"),
        },
        attributes=(
            Attribute("num_features", "num_features", ""),
            Attribute("momentum", "momentum", how="complement"),
            *_NORM,
        ),
    ),
    Kind(
        "attention",
        torch="MultiheadAttention",
        nnx="MultiHeadAttention|MultiheadAttention",
        linen="MultiHeadDotProductAttention|MultiHeadAttention|SelfAttention",
        attributes=(
            Attribute("embed_dim", "in_features", ""),
            Attribute("num_heads", "num_heads"),
            Attribute("dropout", "dropout_rate"),
            Attribute("in_proj_bias", "use_bias", how="present"),
        ),
    ),
    Kind(
        # Somebody's model called RNN has another form than torch's layer.
        "recurrent",
        torch="RNNBase|RNNCellBase|RNN|GRU|LSTM|RNNCell|GRUCell|LSTMCell",
        nnx=r"RNN|Bidirectional|\w*LSTMCell|\w*GRUCell|\w*SimpleCell|LSTM|GRU|RNNCell",
        linen=r"RNN|Bidirectional|\w*LSTMCell|\w*GRUCell|\w*SimpleCell|MGUCell",
        attributes=(
            Attribute("input_size", "in_features", ""),
            Attribute("hidden_size", "hidden_features", "features"),
        ),
        only_torchs=True,
    ),
    Kind(
        "dropout",
        torch=r"_DropoutNd|\w*Dropout[123]?d?",
        nnx="Dropout",
        linen="Dropout",
        attributes=(Attribute("p", "rate"),),
    ),
    Kind("pool", torch=r"(Adaptive)?(Max|Avg)Pool[123]d"),
    Kind("flatten", torch="Flatten|Unflatten"),
    Kind(
        "activation",
        torch=(
            r"\w*GELU\w*|ReLU6?|LeakyReLU|ELU|SELU|CELU|SiLU|Mish|Sigmoid|Tanh|Softplus|Softmax"
            r"|GLU|Hardswish|Hardsigmoid|LogSigmoid|LogSoftmax|\w*Activation|PReLU|Softsign"
        ),
        nnx="PReLU|GELU|ReLU|SiLU|Tanh|Sigmoid",
        linen="PReLU",
    ),
)


@functools.cache
def kinds() -> Mapping[str, Kind]:
    """Every kind by its name: ours first, then those that plugins add.

    A plugin that is broken, or that gives a kind that exists, is a warning.
    """
    found = {k.name: k for k in BUILT_IN}
    for point, given in plugins.load("zooconvert.kinds"):
        try:
            rows = [given] if isinstance(given, Kind) else list(given)
        except TypeError:
            rows = [given]
        for row in rows:
            if not isinstance(row, Kind):
                plugins.refuse(point, f"gives {row!r}, which is not a zoo.layout.Kind: not used")
            elif row.name in found:
                plugins.refuse(point, f"gives the kind {row.name!r}, which exists: not used")
            else:
                found[row.name] = row
    return MappingProxyType(found)


def of_group(*groups: str) -> tuple[str, ...]:
    """The names of the kinds of these groups: of "conv", conv1d, conv2d and conv3d."""
    return tuple(k.name for k in kinds().values() if k.flax_group in groups)


def torch_kind(module: Any) -> str:
    """The kind of a torch module: "linear", "conv2d", "norm", ...; "other" for one's own."""
    return next((k.name for k in _of_class(type(module), Kind.is_torch)), "other")


def flax_kind(module: Any) -> str:
    """The kind of a Flax module; a convolution is "conv" of any number of axes."""
    return next((k.flax_group for k in _of_class(type(module), Kind.is_flax)), "other")


def compatible(torch: str, flax: str) -> bool:
    """Whether layers of these kinds can be the same layer."""
    row = kinds().get(torch)
    return flax == (row.flax_group if row else torch)


@functools.cache
def _rows() -> tuple[Kind, ...]:
    """The rows in the order in which a class is tried: a plugin's names are closer than our
    patterns."""
    return (*list(kinds().values())[len(BUILT_IN) :], *BUILT_IN)


def _of_class(cls: type, matches: Callable[[Kind, type], bool]) -> Iterable[Kind]:
    """The rows that name a class or its bases, the nearest base first."""
    return (k for base in cls.__mro__ for k in _rows() if matches(k, base))


def _pairs(padding: Any) -> Any:
    if isinstance(padding, str):
        return padding.upper()
    sizes = (padding,) if isinstance(padding, int) else tuple(padding)
    return tuple((n, n) for n in sizes)


def _symmetric(padding: Any) -> Any:
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"torch has no padding {padding!r}")
        return padding.lower()
    if isinstance(padding, int):
        return padding
    pairs = [(n, n) if isinstance(n, int) else tuple(n) for n in padding]
    if any(before != after for before, after in pairs):
        raise ValueError(f"torch pads both ends alike, and this is {padding}")
    return tuple(before for before, _ in pairs)


def _single(value: Any) -> Any:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    if len(sizes) != 1:
        raise ValueError(f"{sizes} are several axes, and Flax's layer takes one")
    return sizes[0]


def _complement(value: float | None) -> float:
    if value is None:
        raise ValueError("torch's momentum=None is a cumulative average, which Flax does not have")
    return round(1 - value, 12)  # 1 - 0.9 is 0.09999999999999998


def _present(value: Any) -> bool:
    return value is not None and value is not False


_TRANSLATE: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "same": (lambda v: v, lambda v: v),
    "complement": (_complement, _complement),
    "present": (_present, _present),
    "padding": (_pairs, _symmetric),
    "single": (_single, lambda v: (v,)),
}
