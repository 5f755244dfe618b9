"""GPT-2 as transformers 4's FlaxGPT2LMHeadModel. Source: huggingface/transformers v4, modeling_flax_gpt2.py (FlaxConv1D looked up, names from memory)."""

from _common_a import state, tree

MANNER = "hf_flax"
ARCHITECTURE = "gpt2"
NOTES = "FlaxConv1D keeps its kernel as (features, inputs), so each kernel IS transposed against torch's Conv1D; c_attn stays fused"
LAYERS, HEADS = 2, 4
TIES = {"lm_head.weight": "transformer.wte.weight"}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import GPT2Config, GPT2LMHeadModel

    return state(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=103,
                n_positions=24,
                n_embd=40,
                n_layer=LAYERS,
                n_head=HEADS,
                bos_token_id=0,
                eos_token_id=0,
            )
        ),
        TIES,
    )


def flax_side(t):
    out = {}
    for name, w in t.items():
        if name in TIES:
            continue
        base, leaf = name.rsplit(".", 1)
        if leaf == "weight":
            last = base.rsplit(".", 1)[-1]
            leaf = (
                "embedding"
                if last in ("wte", "wpe")
                else "scale"
                if last.startswith("ln")
                else "kernel"
            )
        out[f"{base}.{leaf}"] = w.T if leaf == "kernel" else w
    return tree(out)
