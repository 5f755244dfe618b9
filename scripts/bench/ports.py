"""How fast a port is: `convert.port` jitted, beside `convert.to_flax` of the same module, jitted.

    ports.py [--rounds 15] [--only NAME ...] [-o docs/port-speed.json]

Both run in turn in one process, in an order that changes from round to round. Printed are the
medians, the median of the rounds' ratios (port to live) and its 95% interval (the order statistics
of the sign test). The weights are drawn: what is timed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]


def _resnet(**config: Any) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    module = transformers.ResNetModel(transformers.ResNetConfig(**config))
    return module, {"pixel_values": torch.randn(2, 3, 128, 128)}


def resnet18() -> tuple[Any, dict[str, Any]]:
    sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    return _resnet(layer_type="basic", **sizes)


def resnet50() -> tuple[Any, dict[str, Any]]:
    return _resnet()


def minilm() -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    from zoo.models.bert.config import to_hf
    from zoo.registry import get

    config = transformers.BertConfig(**to_hf(get("minilm_l6").config))
    ids = torch.randint(0, config.vocab_size, (4, 64))
    module = transformers.BertModel(config, add_pooling_layer=False)
    return module, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def decoder() -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    config = transformers.GPT2Config(n_layer=6, n_head=12, n_embd=384, use_cache=False)
    return transformers.GPT2Model(config), {"input_ids": torch.randint(0, 50257, (4, 64))}


MODELS = {"resnet18": resnet18, "resnet50": resnet50, "MiniLM": minilm, "GPT-2, 6 layers": decoder}


def contenders(name: str) -> dict[str, Callable[[], Any]]:
    """The live module and the port of one model, traced, compiled and warm."""
    import jax
    import torch
    from flax import nnx

    import convert

    torch.manual_seed(0)
    module, call = MODELS[name]()
    module = module.eval()

    def in_jax(call: dict[str, Any]) -> dict[str, Any]:
        return {n: jax.numpy.asarray(x.numpy()) for n, x in call.items()}

    def jitted(net: Any, arrays: dict[str, Any]) -> Callable[[], Any]:
        graph, state = nnx.split(net)
        run = jax.jit(lambda state, call: jax.tree.leaves(nnx.merge(graph, state)(**call))[0])
        run(state, arrays).block_until_ready()
        return lambda: run(state, arrays).block_until_ready()

    live = jitted(convert.to_flax(module, call, verify=False), in_jax(call))
    port = convert.port(module, call, verify=False)
    return {"live": live, "port": jitted(port.net(), in_jax(port.flax_inputs()))}


def timed(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    times: dict[str, list[float]] = {c: [] for c in runs}
    for k in range(rounds):
        for contender in sorted(runs, reverse=bool(k % 2)):
            started = time.perf_counter()
            runs[contender]()
            times[contender].append(time.perf_counter() - started)
    return times


def row(name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    from live import interval

    ratios = [a / b for a, b in zip(times["port"], times["live"], strict=True)]
    low, high = interval(ratios)
    return {
        "model": name,
        **{f"{c}, seconds": round(statistics.median(x), 4) for c, x in times.items()},
        "ratio": round(statistics.median(ratios), 3),
        "low": round(low, 3),
        "high": round(high, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in options.only:
        before = os.getloadavg()[0]
        found = row(name, timed(contenders(name), options.rounds))
        rows.append(found | {"load": round(before, 1)})
        print(json.dumps(rows[-1]), flush=True)
    if options.output:
        data = {"rounds": options.rounds, "machine": platform.platform(), "rows": rows}
        options.output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
