"""How fast a live module is: resnet50 and MiniLM, jitted, beside our own twins of the same weights.

    live.py [--rounds 15] [-o docs/live.json]

The contenders run in turn, round after round, in one process: the twin, the live module, torch
eager, torch.compile (left out where there is no compiler). A round's ratio is to the twin's time in
that round; printed are the median ratio and its 95% interval (the order statistics of the sign
test). torchvision may lie in a folder of PYTHONPATH, without its compiled operators.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


def resnet() -> tuple[Any, Any, Any, tuple[Any, ...]]:
    """torchvision's module, our Flax twin with its weights, and inputs for either."""
    import torch
    from corpus_models import vision_without_operators

    vision_without_operators()
    import torchvision

    from zoo.loading import build
    from zoo.registry import get

    torch.manual_seed(0)
    module = torchvision.models.resnet50().eval()
    found = get("resnet50")
    weights = {n: x.numpy() for n, x in module.state_dict().items()}
    twin = build(found.model, found.config, "flax", weights)
    x = torch.randn(4, 3, 224, 224)
    return module, twin, (x,), (x.numpy().transpose(0, 2, 3, 1),)


def minilm() -> tuple[Any, Any, Any, tuple[Any, ...]]:
    """transformers' BertModel of MiniLM's size, our Flax twin with its weights, and inputs."""
    import torch
    import transformers

    from zoo.loading import build
    from zoo.models.bert.config import to_hf
    from zoo.registry import get

    torch.manual_seed(0)
    found = get("minilm_l6")
    config = transformers.BertConfig(**to_hf(found.config), attn_implementation="eager")
    module = transformers.BertModel(config).eval()
    weights = {n: x.detach().numpy() for n, x in module.state_dict().items()}
    twin = build(found.model, found.config, "flax", weights)
    ids = torch.randint(0, found.config.vocab_size, (8, 128))
    return module, twin, (ids, torch.ones_like(ids)), (ids.numpy(), torch.ones_like(ids).numpy())


MODELS = {"resnet50": resnet, "MiniLM": minilm}


def contenders(name: str) -> dict[str, Callable[[], Any]]:
    """What is run, each ready: traced, compiled and warm."""
    import jax
    import torch
    from flax import nnx

    import convert

    module, twin, given, flax_given = MODELS[name]()
    live = convert.to_flax(module, given, verify=False)

    def jitted(net: Any, inputs: tuple[Any, ...]) -> Callable[[], Any]:
        graph, state = nnx.split(net)
        run = jax.jit(lambda state, *x: jax.tree.leaves(nnx.merge(graph, state)(*x))[0])
        arrays = [jax.numpy.asarray(x) for x in inputs]
        return lambda: jax.block_until_ready(run(state, *arrays))

    def eager(net: Any) -> Callable[[], Any]:
        def run() -> Any:
            with torch.inference_mode():
                return net(*given)

        return run

    found = {
        "twin": jitted(twin, flax_given),
        "live": jitted(live, tuple(x.numpy() for x in given)),
        "torch": eager(module),
        "torch.compile": eager(torch.compile(module)),
    }
    for contender, run in list(found.items()):
        try:
            run()
            run()
        except Exception as e:  # whatever a missing compiler raises
            print(f"{name}: {contender} left out: {type(e).__name__}", file=sys.stderr)
            del found[contender]
    return found


def interval(ratios: list[float]) -> tuple[float, float]:
    """The order statistics between which the median lies in 95 of 100 cases."""
    n = len(ratios)
    tails = [sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range(n)]
    k = max((k for k, p in enumerate(tails) if p <= 0.025), default=0)
    ordered = sorted(ratios)
    return ordered[k], ordered[n - 1 - k]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in MODELS:
        runs = contenders(name)
        times: dict[str, list[float]] = {c: [] for c in runs}
        for _ in range(options.rounds):
            for contender, run in runs.items():
                started = time.perf_counter()
                run()
                times[contender].append(time.perf_counter() - started)
        for contender, seconds in times.items():
            ratios = [a / b for a, b in zip(seconds, times["twin"], strict=True)]
            low, high = interval(ratios)
            row = {
                "model": name,
                "contender": contender,
                "seconds": round(statistics.median(seconds), 4),
                "ratio": round(statistics.median(ratios), 3),
                "low": round(low, 3),
                "high": round(high, 3),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.output:
        data = {"rounds": options.rounds, "machine": platform.platform(), "rows": rows}
        options.output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
