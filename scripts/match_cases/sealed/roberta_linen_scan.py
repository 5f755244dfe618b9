"""RoBERTa (masked LM) in plain Linen, compact, with nn.scan over the block. Source: flax's own naming, from memory."""
from _common_b import arrays, dense, embed, finish, layers, mhdpa, nest, norm, put, stack

MANNER = "linen_scan"
ARCHITECTURE = "roberta"
NOTES = ("only automatic names: Embed_0/1/2 (words, positions, types), ScanEncoderBlock_0 with a leading layer axis, "
         "MultiHeadDotProductAttention_0 with heads split off, LayerNorm_0/1 after attention and after the MLP, Dense_0/1; the head "
         "is Dense_0, LayerNorm_0 and a bare bias")
HEADS = 3


def torch_side():
    from transformers import RobertaConfig, RobertaForMaskedLM
    return arrays(RobertaForMaskedLM(RobertaConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=3, num_attention_heads=HEADS, intermediate_size=192,
        max_position_embeddings=36, type_vocab_size=1)), TIES)


def block(t, p):
    a = p + "attention."
    return nest(
        MultiHeadDotProductAttention_0=mhdpa(t, a, HEADS, "self.query", "self.key", "self.value", "output.dense"),
        LayerNorm_0=norm(t, a + "output.LayerNorm"),
        Dense_0=dense(t, p + "intermediate.dense"), Dense_1=dense(t, p + "output.dense"),
        LayerNorm_1=norm(t, p + "output.LayerNorm"))


def flax_side(t):
    e, m = "roberta.encoder.layer.", "roberta.embeddings."
    out = {"params/MlmHead_0/bias": t["lm_head.bias"]}
    put(out, "params/Embeddings_0", nest(
        Embed_0=embed(t, m + "word_embeddings"), Embed_1=embed(t, m + "position_embeddings"),
        Embed_2=embed(t, m + "token_type_embeddings"), LayerNorm_0=norm(t, m + "LayerNorm")))
    put(out, "params/ScanEncoderBlock_0", stack([block(t, f"{e}{i}.") for i in range(layers(t, e))]))
    put(out, "params/MlmHead_0", nest(Dense_0=dense(t, "lm_head.dense"), LayerNorm_0=norm(t, "lm_head.layer_norm")))
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias"}
