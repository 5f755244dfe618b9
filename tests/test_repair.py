"""Causes by search: torch's own computation is edited until it gives Flax's values."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from convert.diagnose.causes import CAUSES
from convert.diagnose.repair.candidates import every
from convert.diagnose.repair.edit import NAMELESS
from convert.diagnose.repair.replayed import Observation
from convert.diagnose.repair.search import Answer, Problem, search
from convert.diagnose.repair.worker import Worker
from convert.program.record import Goal, record
from convert.program.replay import replay
from convert.runtime.call import Call
from convert.runtime.torch_calls import trace_torch


class Block(nn.Module):
    """Code between layers as people write it; a test changes it in one place or two."""

    source = """
def turned(x, angles):
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)

def forward(x, w, theta=10000.0):
    B, T, _ = x.shape
    d = 4
    q = (x @ w[0]).view(B, T, 2, d).transpose(1, 2)
    k = (x @ w[1][:, :4]).view(B, T, 1, d).transpose(1, 2)
    angles = torch.outer(torch.arange(T).to(x), theta ** (-torch.arange(2).to(x) / 2))
    q, k = turned(q, angles), turned(k, angles)
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(d)
    scores = scores + torch.full((T, T), -1e9).to(x).triu(1)
    mixed = functional.softmax(scores, dim=-1) @ k
    return x + mixed.transpose(1, 2).reshape(B, T, -1)
"""
    gated = """
def forward(x, w, theta=10000.0):
    a, b = (x @ w[0]).chunk(2, -1)
    x = functional.silu(a) * b.clamp(-3.0, 3.0)
    first, pooled = x[:, 0], x.mean(1)
    return torch.cat((first, pooled), -1)
"""

    told = """
def forward(x, w, theta=10000.0):
    shift, scale = (x.mean(1) @ w[0])[:, None], (x.mean(1) @ w[1])[:, None]
    y = x * (1 + scale) + shift
    for _ in range(3):
        y = torch.sin(y)
    best = y.mean(-1).softmax(-1).topk(2).indices
    last = torch.full((2,), 4) - torch.tensor([1, 2])
    places = torch.arange(6, dtype=x.dtype) + 1.0
    carried = torch.cat((torch.ones_like(y[:, :1]), y[:, :-1]), 1)
    y = y + carried / places[:, None] ** 0.5
    picked = x.gather(1, best[..., None].expand(-1, -1, 8))
    return torch.cat((y, picked, y[torch.arange(2), last][:, None]), 1)
"""

    met = """
def forward(x, w, theta=10000.0):
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    seen = torch.hstack([torch.zeros(6, 2), torch.full((6, 6), -1e9).triu(1)]).to(x)
    keys = torch.cat((x[:, :2] * 0.5, x), 1)
    shares = (x @ keys.transpose(1, 2) + seen).softmax(-1)
    blocks = x.view(2, 3, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(2, 6, 8)
    bands = torch.linspace(1.0, 1000.0, 4).to(x)
    return torch.cat((shares @ keys, blocks, functional.glu(x, -1) * bands), -1)
"""
    turns = """
def forward(x, w, theta=10000.0):
    h, made = torch.zeros(2, 8).to(x), []
    for t in range(6):
        h = h * torch.sigmoid(x[:, t] @ w[0]) + x[:, t]
        made.append(h * torch.tanh(x[:, t] @ w[1]))
    mixed = torch.zeros_like(x[:, 0])
    for e in range(3):
        mixed = mixed + torch.sin(x[:, e] @ w[0]) * x[:, e + 3]
    windows = torch.arange(3, dtype=x.dtype)[None, :, None] + x.view(2, 1, 48).expand(2, 3, 48)
    return torch.cat((torch.stack(made, 1).flatten(1), mixed, windows.flatten(1)), 1)
"""
    parted = """
def apart(x, n):
    return x[..., :n], x[..., n:]

def forward(x, w, theta=10000.0):
    a, _ = apart(x @ w[0], 5)
    b, c = apart(x @ w[1], 3)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    pooled = functional.max_pool1d(x.transpose(1, 2), 4, ceil_mode=True)
    made = torch.cat((x, a, b, torch.sin(c)), -1)
    return torch.cat((made.flatten(1), pooled.flatten(1)), 1)
"""

    def __init__(self, source: str = source) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(0)
        self.w = nn.ParameterList(torch.randn(8, 8, generator=make).double() / 2 for _ in "qk")
        self.function = compiled(source)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, list(self.w))  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: object) -> Block:
        made = Block()
        made.function = self.function  # the weights follow from the seed
        return made


def compiled(source: str) -> Callable[..., torch.Tensor]:
    space = {"torch": torch, "math": math, "functional": functional}
    exec(compile(source, "<block>", "exec"), space)
    return space["forward"]  # type: ignore[return-value]


def inputs(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, 6, 8))


def observed(
    net: Block, other: Callable[..., torch.Tensor], seed: int
) -> tuple[object, Observation]:
    call = Call(args=(inputs(seed),))
    known = trace_torch(net, call, "float64").by_key()
    found = record(copy.deepcopy(net), call, "float64", known, [], Goal(("", 0), "output", ""))
    with torch.no_grad():
        x = torch.from_numpy(inputs(seed))
        right, given = net(x).numpy(), other(x, list(net.w)).numpy()
    return found.program, Observation(found.leaves, [given], right, 1e-9)


def answer(changes: list[tuple[str, str]], seconds: float = 30.0) -> Answer:
    sources = (Block.source, Block.gated, Block.told, Block.met, Block.turns, Block.parted)
    source = next(s for s in sources if all(old in s for old, _ in changes))
    net = Block(source)
    for old, new in changes:
        assert source.count(old) >= 1
        source = source.replace(old, new)
    seen = [observed(net, compiled(source), seed) for seed in (0, 1)]
    return search(Problem(seen[0][0], [s for _, s in seen], seconds))  # type: ignore[arg-type]


@pytest.mark.parametrize(("old", "new", "cause"), [
    ("theta=10000.0", "theta=500000.0", "constant"),
    ("softmax(scores, dim=-1)", "softmax(scores, dim=-2)", "softmax_axis"),
    (" / math.sqrt(d)", "", "scale"),
    ("x + mixed", "mixed", "residual"),
    ("triu(1)", "triu(0)", "causal"),
    ("q = (x @ w[0]).view(B, T, 2, d)", "q = (x @ w[0]).view(B, T, d, 2).transpose(2, 3)", "heads"),
    ("q, k = turned(q, angles), turned(k, angles)", "q, k = q, turned(k, angles)", "left_out"),
    ("a, b = (x", "b, a = (x", "swapped"),
    ("functional.silu(a)", "functional.gelu(a)", "activation"),
    ("clamp(-3.0, 3.0)", "clamp(-3.0, 1.0)", "constant"),
    ("x.mean(1)", "x.amax(1)", "operation"),
    ("x[:, 0]", "x[:, -1]", "token"),
    ("torch.cat((first, pooled), -1)", "torch.cat((pooled, first), -1)", "concat"),
    ("(1 + scale)", "scale", "scale_plus_one"),
    (" + shift", "", "left_out"),
    ("range(3)", "range(2)", "size"),
    ("softmax(-1).topk", "softmax(-1).neg().topk", "reversed"),
    (" - torch.tensor([1, 2])", "", "offset"),
    ("(torch.ones_like(y[:, :1]), y[:, :-1])", "(y[:, :-1], torch.ones_like(y[:, :1]))", "offset"),
    ("[torch.arange(2), last]", "[torch.arange(2), last * 0]", "token"),
    ("x = x * torch.rsqrt", "x = x - x.mean(-1, keepdim=True)\n    x = x * torch.rsqrt",
     "norm_kind"),
    ("torch.full((6, 6), -1e9).triu(1)])", "torch.zeros(6, 6)]) + torch.full((6, 8), -1e9).triu(1)",
     "causal"),
    (".permute(0, 1, 3, 2, 4)", "", "rearranged"),
    ("functional.glu(x, -1)", "(x[..., :4].sigmoid() * x[..., 4:])", "operand"),
    ("torch.linspace(1.0, 1000.0, 4)", "torch.logspace(0, 3, 4)", "constant"),
    ("h = h * torch.sigmoid(x[:, t] @ w[0]) + x[:, t]\n        made.append(h * ",
     "b, h = h, h * torch.sigmoid(x[:, t] @ w[0]) + x[:, t]\n        made.append(b * ", "operand"),
    ("torch.sin(x[:, e] @ w[0]) * x[:, e + 3]", "torch.sin((x[:, e] * x[:, e + 3]) @ w[0])",
     "order"),
    ("torch.arange(3, dtype=x.dtype)[None, :, None] +",
     "torch.arange(3, dtype=x.dtype).repeat_interleave(2).view(2, 3, 1) +", "rearranged"),
    ("return x[..., :n], x[..., n:]", "return x[..., -n:], x[..., :-n]", "blocks"),
    ("x.pow(2).mean(-1, keepdim=True)",
     "x.pow(2).view(2, 6, 2, 4).mean(-1, keepdim=True).expand(2, 6, 2, 4).flatten(2)", "axis"),
    ("max_pool1d(x.transpose(1, 2), 4, ceil_mode=True)",
     "max_pool1d(functional.pad(x.transpose(1, 2), (2, 0), value=-math.inf), 4)", "pooling"),
])  # fmt: skip
def test_an_edit_is_found(old: str, new: str, cause: str) -> None:
    fits = answer([(old, new)]).fits
    assert fits, "nothing fits"
    assert fits[0].cause == cause, fits


def test_a_solved_number_is_said() -> None:
    (best, *_) = answer([(" / math.sqrt(d)", " / 1.37")]).fits
    assert best.cause == "scale"
    assert best.free
    assert re.search(r"\d\.\d{4}", best.said), best


def test_two_edits_at_once_are_found() -> None:
    fits = answer([("functional.silu(a)", "functional.gelu(a)"), ("x.mean(1)", "x.amax(1)")]).fits
    assert fits
    assert "gelu" in fits[0].said
    assert "max" in fits[0].said
    assert fits[0].cause == NAMELESS, "two edits of different meaning may fit by luck"


def test_values_that_nothing_makes_fit_nothing() -> None:
    net = Block(Block.gated)
    rng = np.random.default_rng(5)
    program, seen = observed(net, compiled(Block.gated), 0)
    for _ in range(3):
        target = seen.right + 0.1 * rng.normal(size=seen.right.shape)
        null = Observation(seen.leaves, [target], seen.right, 1e-9)
        found = search(Problem(program, [null], 60.0))  # type: ignore[arg-type]
        assert found.finished
        assert found.tried > 500
        assert not found.fits


def test_what_a_second_sample_denies_is_no_explanation() -> None:
    net = Block(Block.gated)
    program, first = observed(net, compiled(Block.gated.replace("x.mean(1)", "x.amax(1)")), 0)
    _, second = observed(net, compiled(Block.gated.replace("x[:, 0]", "x[:, 1]")), 1)
    found = search(Problem(program, [first, second], 2.0))  # type: ignore[arg-type]
    assert not found.fits


def test_a_program_that_does_not_give_torchs_values_explains_nothing() -> None:
    net = Block()
    program, seen = observed(net, compiled(Block.source), 0)
    wrong = Observation(seen.leaves, seen.targets, seen.right + 1.0, 1e-9)
    assert not search(Problem(program, [wrong], 2.0)).reproduced  # type: ignore[arg-type]


def test_every_word_of_an_edit_is_a_cause() -> None:
    net = Block()
    program, seen = observed(net, compiled(Block.source), 0)
    edits = list(every(program, replay(program, seen.leaves)))  # type: ignore[arg-type]
    assert len(edits) > 500
    assert {e.cause for e in edits} <= set(CAUSES)


def test_a_process_that_dies_is_no_error() -> None:
    net = Block(Block.gated)
    program, seen = observed(net, compiled(Block.gated.replace("x.mean(1)", "x.amax(1)")), 0)
    problem = Problem(program, [seen], 10.0)  # type: ignore[arg-type]
    worker = Worker()
    try:
        assert worker.solve(problem).fits[0].cause == "operation"
        for _ in range(2):  # the second process is started for the first one's problem
            worker.process = worker._start()
            worker.process.kill()
            found = worker.solve(problem)
            assert not found.fits
            assert not found.finished
    finally:
        worker.close()


def test_a_candidate_that_ended_a_process_is_not_tried_again() -> None:
    net = Block(Block.gated)
    program, seen = observed(net, compiled(Block.gated.replace("x.mean(1)", "x.amax(1)")), 0)
    problem = Problem(program, [seen], 10.0)  # type: ignore[arg-type]
    tried: list[int] = []
    (best, *_) = search(problem, tried.append).fits
    skipped = frozenset(tried)
    again: list[int] = []
    fits = search(dataclasses.replace(problem, skip=skipped), again.append).fits
    assert not skipped & set(again)
    assert best not in fits
