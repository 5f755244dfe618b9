"""What sort of layer a module is, by the names of its classes, in either framework."""

from __future__ import annotations

import re
from typing import Any

_TORCH = {
    "linear": r"Linear|LazyLinear|NonDynamicallyQuantizableLinear|Conv1D",
    "conv1d": r"(Lazy)?Conv1d",
    "conv2d": r"(Lazy)?Conv2d",
    "conv3d": r"(Lazy)?Conv3d",
    "conv_transpose": r"(Lazy)?ConvTranspose[123]d",
    "embedding": r"Embedding|EmbeddingBag",
    "batchnorm": r"_BatchNorm|BatchNorm\w*|SyncBatchNorm",
    "norm": r"LayerNorm|GroupNorm|\w*RMSNorm|\w*LayerNorm|InstanceNorm[123]d",
    "attention": r"MultiheadAttention",
    "recurrent": r"RNNBase|RNNCellBase|RNN|GRU|LSTM|RNNCell|GRUCell|LSTMCell",
    "dropout": r"_DropoutNd|\w*Dropout[123]?d?",
    "pool": r"(Adaptive)?(Max|Avg)Pool[123]d",
    "flatten": r"Flatten|Unflatten",
    "activation": (
        r"\w*GELU\w*|ReLU6?|LeakyReLU|ELU|SELU|CELU|SiLU|Mish|Sigmoid|Tanh|Softplus|Softmax|GLU"
        r"|Hardswish|Hardsigmoid|LogSigmoid|LogSoftmax|\w*Activation|PReLU|Softsign"
    ),
}
_FLAX = {
    "linear": r"Dense|DenseGeneral|Linear|LinearGeneral",
    "conv": r"Conv|ConvLocal",
    "conv_transpose": r"ConvTranspose",
    "embedding": r"Embed",
    "batchnorm": r"BatchNorm",
    "norm": r"LayerNorm|GroupNorm|RMSNorm|InstanceNorm",
    "attention": r"MultiHeadDotProductAttention|MultiHeadAttention|SelfAttention"
    r"|MultiheadAttention",
    "recurrent": r"RNN|Bidirectional|\w*LSTMCell|\w*GRUCell|\w*SimpleCell|MGUCell|LSTM|GRU|RNNCell",
    "dropout": r"Dropout",
    "activation": r"PReLU|GELU|ReLU|SiLU|Tanh|Sigmoid",
}


def torch_kind(module: Any) -> str:
    """The kind of a torch module: "linear", "conv2d", "norm", ...; "other" for one's own."""
    return _kind(type(module), _TORCH)


def flax_kind(module: Any) -> str:
    """The kind of a Flax module; a convolution is "conv" of any number of axes."""
    return _kind(type(module), _FLAX)


def _kind(cls: type, table: dict[str, str]) -> str:
    for base in cls.__mro__:
        for kind, names in table.items():
            if re.fullmatch(names, base.__name__) and not _own_recurrent(base, kind, table):
                return kind
    return "other"


def _own_recurrent(cls: type, kind: str, table: dict[str, str]) -> bool:
    """A whole model of somebody's that is called RNN: torch's own layer has another form."""
    return table is _TORCH and kind == "recurrent" and not cls.__module__.startswith("torch.")


def compatible(torch: str, flax: str) -> bool:
    """Whether layers of these kinds can be the same layer."""
    return flax == ("conv" if re.fullmatch(r"conv\dd", torch) else torch)


def normal(name: str) -> str:
    """A path as both frameworks would spell it: `layers_0` is `layers.0`, case does not count."""
    return re.sub(r"_(\d+)(?=\.|$)", r".\1", name).lower()
