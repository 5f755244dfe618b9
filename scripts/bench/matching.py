"""What a match by names costs: 1,000 and 20,000 tensors, a model of experts in two spellings."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]
Shapes = dict[str, tuple[int, ...]]
D, HEADS, HEAD, FF, WORDS = 64, 4, 16, 96, 1000


def sides(layers: int, experts: int) -> tuple[Shapes, Shapes]:
    """Headers of one model, as transformers and as a list of NNX layers have it."""
    torch: Shapes = {"model.embed_tokens.weight": (WORDS, D), "model.norm.weight": (D,)}
    flax: Shapes = {"embedder.embedding": (WORDS, D), "final_norm.scale": (D,)}
    for i in range(layers):
        ours, theirs = f"model.layers.{i}", f"blocks.{i}"
        torch |= {f"{ours}.self_attn.{p}_proj.weight": (D, D) for p in "qkvo"}
        flax |= {f"{theirs}.attn.{p}_proj.kernel": (D, HEADS, HEAD) for p in "qkv"}
        flax[f"{theirs}.attn.o_proj.kernel"] = (HEADS, HEAD, D)
        for a, b in (("input_layernorm", "ln_attn"), ("post_attention_layernorm", "ln_mlp")):
            torch[f"{ours}.{a}.weight"] = flax[f"{theirs}.{b}.scale"] = (D,)
        torch[f"{ours}.mlp.gate.weight"] = (experts, D)
        flax[f"{theirs}.moe.router.kernel"] = (D, experts)
        for e in range(experts):
            for a, b, shape in (("gate_proj", "w_gate", (FF, D)), ("up_proj", "w_up", (FF, D)),
                                ("down_proj", "w_down", (D, FF))):  # fmt: skip
                torch[f"{ours}.mlp.experts.{e}.{a}.weight"] = shape
                flax[f"{theirs}.moe.experts.{e}.{b}.kernel"] = shape[::-1]
    return torch, flax


def main() -> None:
    """Print seconds and the peak of memory, one process a size."""
    from convert.matching.by_names import by_names
    from convert.matching.orientation import UnitPair, choose
    from convert.matching.unit_entries import entries
    from convert.matching.units import aligned, ways

    for layers, experts in ((10, 30), (50, 130)):
        torch, flax = sides(layers, experts)
        started = time.perf_counter()
        chosen, *_ = by_names(torch, flax, {})
        pairs = [UnitPair(a, b, ways(a, b)) for c in chosen for a, b in aligned(c.ours, c.theirs)]
        made = [
            entry
            for pair, (way, _) in zip(pairs, choose(pairs, []), strict=True)
            if way is not None
            for entry in entries(pair.ours, pair.theirs, way)
        ]
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{len(torch)} tensors: {len(made)} entries in {seconds:.2f} s, {peak:.0f} MB")


if __name__ == "__main__":
    main()
