"""Tokens made one after another: the same in both frameworks, cached or not, greedy or drawn.

The families are data (generators.py). What makes samples or frames is in its family's file."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from generators import GENERATORS, STEPS, Generator
from support import canonical

from convert.compare.outputs import run
from convert.judge.noise import EXACT
from zoo.loading import build
from zoo.nn import attention_flax, attention_torch, generation_flax, generation_torch
from zoo.registry import families

FRAMEWORKS = pytest.mark.parametrize("framework", ["torch", "flax"])
EVERY = pytest.mark.parametrize("g", [pytest.param(g, id=n) for n, g in GENERATORS.items()])


def test_every_family_that_makes_tokens_is_here() -> None:
    found = set()
    for name, model in families().items():
        with torch.device("meta"):
            module = model.definition("torch")(next(iter(model.tiny.values())))
        generate = getattr(module, "generate", None)
        if generate and "max_new_tokens" in inspect.signature(generate).parameters:
            found.add(name)
    assert found == GENERATORS.keys()


@EVERY
def test_greedy_tokens_are_the_same_cached_or_not_in_both(g: Generator) -> None:
    """With experts too: there are no more positions than any of them has room for."""
    made = [g.decode(f, use_cache=u) for f in ("torch", "flax") for u in (True, False)]
    assert made[0].shape == (2, STEPS)
    assert len(np.unique(made[0][0])) > 5, "too dull to show a mistake"
    assert (made[0][0] != made[0][1]).any()
    assert all((made[0] == other).all() for other in made[1:])


@FRAMEWORKS
@EVERY
def test_one_token_at_a_time_has_the_logits_of_all_at_once(g: Generator, framework: str) -> None:
    weights, inputs = canonical(g.model, g.config), g.model.inputs(g.config)
    names = (g.source, g.target, g.mask)
    given = {n: inputs[n] for n in names}
    found = run(g.model, g.config, "torch", weights, given, "float64")
    whole = found["output.logits"] if "output.logits" in found else found["output"]
    source, target, mask = (inputs[n] for n in names)
    T = target.shape[1]
    with jax.enable_x64(True), torch.no_grad():
        model = build(g.model, g.config, framework, weights, param_dtype="float64")
        step, empty = model.decode, attention_flax.empty_cache
        if framework == "torch":
            source, target, mask = map(torch.from_numpy, (source, target, mask))
            empty = attention_torch.empty_cache
        else:
            graph, state = nnx.split(model)
            step = jax.jit(lambda *a: nnx.merge(graph, state).decode(*a))
        memory = model.remember(source, mask)
        past = [empty(kv, T) for kv in memory]
        logits = []
        for i in range(T):
            made, past, *_ = step(target[:, i : i + 1], memory, None, mask, past, i)
            logits.append(np.asarray(made))
    assert np.abs(np.concatenate(logits, 1) - whole).max() <= EXACT * np.abs(whole).max()


@EVERY
def test_sampled_tokens_are_the_same_for_the_same_numbers(
    g: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    uniforms = np.random.default_rng(0).random((2, STEPS), np.float32)
    options = {"uniforms": uniforms, "temperature": 0.7, "top_k": 9}
    traces = []

    def counted(*args: Any) -> Any:
        traces.append(args)
        return real(*args)

    real = generation_flax.generate_tokens
    monkeypatch.setattr(generation_flax, "generate_tokens", counted)
    a, b = (g.decode(f, **options) for f in ("torch", "flax"))
    assert (a == b).all()
    assert (a != g.decode("torch")).any()
    options |= {"uniforms": uniforms[::-1].copy(), "temperature": 0.9}
    c, d = (g.decode(f, **options) for f in ("torch", "flax"))
    assert (c == d).all()
    assert (c != a).any()
    assert len(traces) == 1, "compiled anew for other numbers"


@EVERY
@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_after_the_end_there_is_padding(g: Generator, how: str) -> None:
    drawn = {"uniforms": np.random.default_rng(0).random((2, STEPS), np.float32)}
    drawn |= {"temperature": 0.7, "top_k": 9}
    options: dict[str, Any] = drawn if how == "sampled" else {}
    plain = g.decode("torch", **options)
    eos = int(plain[0, 9])
    made = [g.decode(f, **options, eos_token=eos, pad_token=3) for f in ("torch", "flax")]
    assert (made[0] == made[1]).all()
    for row, free in zip(made[0], plain, strict=True):
        ends = np.nonzero(free == eos)[0]
        end = ends[0] + 1 if len(ends) else STEPS
        assert (row[:end] == free[:end]).all()
        assert (row[end:] == 3).all()


@FRAMEWORKS
def test_draws_follow_the_probabilities(framework: str) -> None:
    logits = np.log(np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)).repeat(5, 0)
    uniform = np.array([0.0, 0.09, 0.29, 0.59, 0.999], np.float32)
    if framework == "torch":
        choose: Any = generation_torch.choose_token
        x, u = torch.from_numpy(logits), torch.from_numpy(uniform)
    else:
        choose, x, u = generation_flax.choose_token, jnp.asarray(logits), jnp.asarray(uniform)
    assert choose(x).tolist() == [3] * 5
    assert choose(x, u).tolist() == [0, 0, 1, 2, 3]
    assert choose(x, u, top_k=2).tolist() == [2, 2, 2, 3, 3]
    assert choose(x, u, temperature=0.02).tolist() == [0, 3, 3, 3, 3]


@FRAMEWORKS
@EVERY
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"uniforms": np.zeros((2, 3))}, "uniforms are"),
    ],
)
def test_impossible_requests(
    g: Generator, framework: str, options: dict[str, Any], message: str
) -> None:
    model = build(g.model, g.config, framework, canonical(g.model, g.config))
    with pytest.raises(ValueError, match=message):
        model.generate(np.zeros((2, 5)), **{"max_new_tokens": 4, **g.options, **options})
