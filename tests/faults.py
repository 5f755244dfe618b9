"""Faults as people plant them when they port a model: what is wrong, where, and why.

Each is a pair of modules of which the Flax side has one thing wrong. `layers` are the torch names
that may be reported, `causes` the words of `Divergence.cause` that name the fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from fault_modules import FAULTS_OF_USERS
from fault_plants import (
    average,
    behaviour,
    bert_with_mask,
    both,
    convnet,
    every_batchnorm,
    exchange,
    flat_rows,
    flax_batchnorm,
    gate_rows,
    gates_in_code,
    gru_biases,
    half_precision,
    heads_last,
    last_token,
    methods,
    no_residual,
    not_causal,
    padded,
    quick_gelu,
    raised,
    reset_first,
    same_pool,
    self_attention,
    setting,
    shifted_positions,
    stopped,
    twins,
    unscaled_embedding,
    value,
    wavenet_unit,
)

from convert.matching.pair import Pair


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    title: str
    family: str
    plant: Callable[[], Pair]
    layers: tuple[str, ...]
    causes: tuple[str, ...]
    mode: str = "forward"


L0, L1 = "encoder.layer.0", "encoder.layer.1"
SELF_0, SELF_1 = f"{L0}.attention.self", f"{L1}.attention.self"
NORM_0, NORM_1 = f"{L0}.attention.output.LayerNorm", f"{L0}.output.LayerNorm"
bert = partial(twins, "bert", "encoder")
convnets = partial(twins, "convnet")
resnet = partial(twins, "resnet", "basic")
recurrents = partial(twins, "recurrent")
transformer = partial(twins, "transformer", "norm_first")
wavenet = partial(twins, "wavenet", "plain")
FAULTS: list[Fault] = [
    Fault("square kernel not transposed", "bert",
          lambda: bert(value(f"{L1}.attention.self.query.kernel", jnp.transpose)),
          (f"{L1}.attention.self.query",), ("transposed",)),
    Fault("two LayerNorms swapped", "bert",
          lambda: bert(exchange(f"{NORM_0}.scale", f"{NORM_1}.scale")),
          (NORM_0,), ("swapped",)),
    Fault("query and key swapped", "bert",
          lambda: bert(exchange(f"{SELF_0}.query.kernel", f"{SELF_0}.key.kernel")),
          (f"{L0}.attention.self.query",), ("swapped",)),
    Fault("LayerNorm epsilon 1e-5 for 1e-12", "bert",
          lambda: bert(setting(f"{L1}.output.LayerNorm", "epsilon", 1e-5)),
          (f"{L1}.output.LayerNorm",), ("epsilon",)),
    Fault("LayerNorm epsilon 1e-7 for 1e-12, below float32's noise", "bert",
          lambda: bert(setting("embeddings.LayerNorm", "epsilon", 1e-7)),
          ("embeddings.LayerNorm",), ("epsilon",)),
    Fault("GELU by tanh", "bert",
          lambda: bert(setting(f"{L0}.intermediate", "activation", jax.nn.gelu)),
          (f"{L0}.intermediate",), ("gelu",)),
    Fault("quick GELU", "bert",
          lambda: bert(setting(f"{L1}.intermediate", "activation", quick_gelu)),
          (f"{L1}.intermediate",), ("gelu",)),
    Fault("attention not divided by sqrt(head_dim)", "bert",
          lambda: bert(behaviour(SELF_0, self_attention(scale=1.0))),
          (SELF_0,), ("scale",)),
    Fault("head_dim before heads", "bert",
          lambda: bert(behaviour(SELF_1, self_attention(split="heads last"))),
          (SELF_1,), ("heads",)),
    Fault("another number of heads", "bert", lambda: bert(flax_config={"num_attention_heads": 8}),
          (SELF_0,), ("heads",)),
    Fault("softmax over the queries", "bert",
          lambda: bert(behaviour(SELF_0, self_attention(axis=-2))),
          (SELF_0,), ("softmax_axis",)),
    Fault("mask not applied", "bert",
          lambda: bert(behaviour(SELF_0, self_attention(mask="none"))),
          (SELF_0,), ("mask",)),
    Fault("mask inverted", "bert",
          lambda: bert(behaviour("", bert_with_mask(lambda m: m.astype(jnp.float32) * -1e9))),
          ("encoder", ""), ("mask",)),
    Fault("masked logits only lowered by 1", "bert",
          lambda: bert(behaviour("", bert_with_mask(lambda m: m.astype(jnp.float32) - 1.0))),
          ("encoder", ""), ("mask",)),
    Fault("residual left out", "bert", lambda: bert(behaviour(f"{L0}.output", no_residual)),
          (f"{L0}.output",), ("residual",)),
    Fault("last token pooled", "bert", lambda: bert(behaviour("pooler", last_token)),
          ("pooler",), ("token",)),
    Fault("positions counted from one", "bert",
          lambda: bert(behaviour("embeddings", shifted_positions)),
          ("embeddings", "embeddings.position_embeddings"), ("offset",)),
    Fault("dropout left on", "bert",
          lambda: bert(setting("embeddings.dropout", "deterministic", False),
                       hidden_dropout_prob=0.1),
          ("embeddings.dropout",), ("dropout",)),
    Fault("a layer in bfloat16", "bert",
          lambda: bert(setting(f"{L0}.intermediate.dense", "dtype", jnp.bfloat16)),
          (f"{L0}.intermediate.dense",), ("dtype",)),
    Fault("weights that went through bfloat16", "bert",
          lambda: bert(value(f"{L1}.intermediate.dense.kernel",
                             lambda x: x.astype(jnp.bfloat16).astype(jnp.float32))),
          (f"{L1}.intermediate.dense",), ("dtype",)),
    Fault("activation in float16", "bert",
          lambda: bert(behaviour(f"{L0}.intermediate", half_precision)),
          (f"{L0}.intermediate",), ("dtype",)),
    Fault("fast variance at a large mean", "bert",
          lambda: bert(setting("embeddings.LayerNorm", "use_fast_variance", True), weights=raised),
          ("embeddings.LayerNorm",), ("fast_variance",)),
    Fault("a norm left at its default", "bert",
          lambda: bert(value(f"{L0}.output.LayerNorm.scale", jnp.ones_like)),
          (f"{L0}.output.LayerNorm",), ("default",)),
    Fault("padding_idx gets a gradient", "bert",
          lambda: padded(bert(setting("embeddings.word_embeddings", "padding_idx", None))),
          ("embeddings.word_embeddings",), ("padding_idx",), "backward"),
    Fault("gradient stopped", "bert", lambda: bert(behaviour("pooler", stopped)),
          ("pooler",), ("stop_gradient",), "backward"),
    Fault("image flattened channel last", "convnet",
          lambda: convnets("pooled", behaviour("", convnet(flat=True))), ("fc1", ""), ("flatten",)),
    Fault("kernel's rows flattened channel last", "convnet",
          lambda: convnets("pooled", value("fc1.kernel", flat_rows)), ("fc1",), ("flatten",)),
    Fault("average pool for maximum", "convnet",
          lambda: convnets("pooled", behaviour("", convnet(pool=average))),
          ("conv2", ""), ("pooling",)),
    Fault("kernel flipped", "convnet",
          lambda: convnets("deep", value("conv1.kernel", lambda k: k[::-1, ::-1])),
          ("conv1",), ("flipped",)),
    Fault("bias left out", "convnet",
          lambda: convnets("deep", value("fc2.bias", jnp.zeros_like)), ("fc2",), ("bias_missing",)),
    Fault("SAME padding with a stride", "resnet",
          lambda: resnet(setting("layer2.0.conv1", "padding", "SAME")),
          ("layer2.0.conv1",), ("padding",)),
    Fault("SAME padding of a pool", "resnet",
          lambda: resnet(behaviour("maxpool", same_pool)), ("maxpool",), ("pooling",)),
    Fault("height and width swapped", "resnet",
          lambda: resnet(value("conv1.kernel", lambda k: k.transpose(1, 0, 2, 3))),
          ("conv1",), ("transposed",)),
    Fault("BatchNorm epsilon 1e-3", "resnet",
          lambda: resnet(setting("layer1.0.bn1", "epsilon", 1e-3)),
          ("layer1.0.bn1",), ("epsilon",)),
    Fault("BatchNorm by the batch in eval", "resnet",
          lambda: resnet(setting("layer1.1.bn2", "use_running_average", False)),
          ("layer1.1.bn2",), ("batch_statistics",)),
    Fault("running mean and bias swapped", "resnet",
          lambda: resnet(exchange("layer3.0.bn1.mean", "layer3.0.bn1.bias")),
          ("layer3.0.bn1",), ("swapped",)),
    Fault("BatchNorm momentum is the complement", "resnet",
          lambda: resnet(every_batchnorm(flax_batchnorm(share=0.9)), train=True),
          ("bn1",), ("momentum",), "training"),
    Fault("running variance biased", "resnet",
          lambda: resnet(every_batchnorm(flax_batchnorm(unbiased=False)), train=True),
          ("bn1",), ("unbiased_variance",), "training"),
    Fault("gate order i,f,o,g in the weights", "recurrent",
          lambda: recurrents("lstm", both(*(
              value(f"lstm.{n}_l0", gate_rows((0, 1, 3, 2)))
              for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))),
          ("lstm",), ("gates",)),
    Fault("gate order i,f,o,g in the code", "recurrent",
          lambda: recurrents("lstm", setting("lstm", "step", gates_in_code)),
          ("lstm",), ("gates",)),
    Fault("GRU's two biases added up", "recurrent",
          lambda: recurrents("gru", gru_biases), ("gru",), ("bias_sum", "gru_bias")),
    Fault("GRU resets before the product", "recurrent",
          lambda: recurrents("gru", setting("gru", "step", reset_first), bidirectional=False),
          ("gru",), ("gru_reset",)),
    Fault("hidden bias left out", "recurrent",
          lambda: recurrents("rnn", value("rnn.bias_hh_l0", jnp.zeros_like)),
          ("rnn",), ("bias_missing",)),
    Fault("embeddings not multiplied by sqrt(d)", "transformer",
          lambda: transformer(methods("", _embed=unscaled_embedding)),
          ("dropout", ""), ("scale",)),
    Fault("causal mask missing", "transformer",
          lambda: transformer(behaviour("decoder", not_causal)),
          ("decoder",), ("causal",)),
    Fault("norm last for norm first", "transformer",
          lambda: transformer(setting("encoder.layers.0", "norm_first", False)),
          ("encoder.layers.0",), ("norm_order",)),
    Fault("query and value swapped in a fused projection", "transformer",
          lambda: transformer(exchange(
              "decoder.layers.0.self_attn.query.kernel",
              "decoder.layers.0.self_attn.value.kernel")),
          ("decoder.layers.0.self_attn",), ("swapped",)),
    Fault("head_dim before heads", "transformer",
          lambda: transformer(methods("encoder.layers.0.self_attn", _heads=heads_last)),
          ("encoder.layers.0.self_attn", "encoder.layers.0"), ("heads",)),
    Fault("tanh and sigmoid of the gated unit swapped", "wavenet",
          lambda: wavenet(behaviour("layers.0.unit", wavenet_unit)),
          ("layers.0.unit",), ("activation",)),
    Fault("SAME padding for causal", "wavenet",
          lambda: wavenet(setting("layers.1.filter", "padding", "SAME")),
          ("layers.1.filter",), ("padding",)),
    Fault("dilation left out", "wavenet",
          lambda: wavenet(setting("layers.1.gate", "kernel_dilation", 1)),
          ("layers.1.gate",), ("dilation",)),
    *(Fault(*fields) for fields in FAULTS_OF_USERS),
]  # fmt: skip
