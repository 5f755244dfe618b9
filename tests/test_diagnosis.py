"""Every planted fault is found where it is, and named for what it is."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from faults import FAULTS, Fault
from test_docs import script

from convert.compare.settings import EXPLAIN
from convert.diagnose.find import first_divergence
from convert.diagnose.hypotheses_tensors import explain_tensor
from zoo import probe

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.family}: {f.title}")
def test_a_planted_fault_is_found_and_named(fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "convert.diagnose")
    found = first_divergence(fault.plant(), fault.mode)  # type: ignore[arg-type]
    if found is not None and found.cause == "unknown":  # the search is for what no rule knows
        found = first_divergence(fault.plant(), fault.mode, EXPLAIN)  # type: ignore[arg-type]
        caplog.clear()
    assert found is not None, "not found"
    assert found.layer in fault.layers
    assert found.cause in fault.causes, found.diagnosis
    assert found.ratio > 8 or found.cause == "epsilon"
    assert found.advice
    failed = [r.getMessage() for r in caplog.records if r.name.startswith("convert.diagnose")]
    assert not failed, "hypotheses that raise"


def test_the_table_holds_these_faults() -> None:
    table = json.loads((ROOT / "docs" / "faults.json").read_text())
    assert [(f["family"], f["title"]) for f in table] == [(f.family, f.title) for f in FAULTS]
    assert all(f["layer_right"] for f in table)
    assert sum(f["cause_right"] for f in table) >= 0.9 * len(table) >= 18
    text = (ROOT / "docs" / "faults.md").read_text()
    assert all(f.title in text for f in FAULTS)
    assert text == script("faults").document(table), "stale: run scripts/faults.py --text"


A = probe.weight("a.weight", (12, 12))
OTHERS = {"b.weight": probe.weight("b.weight", (12, 12))}
GATES = probe.weight("lstm.weight_ih_l0", (16, 5))
BIAS, OTHER_BIAS = probe.weight("gru.bias_ih", (12,)), probe.weight("gru.bias_hh", (12,))


@pytest.mark.parametrize(
    ("a", "b", "kind", "words"),
    [
        (A, A.T, "linear", "transposed"),
        (A, A[::-1], "linear", "flipped"),
        (A, OTHERS["b.weight"], "linear", "values of b.weight"),
        (A, OTHERS["b.weight"].T, "linear", "values of b.weight, transposed"),
        (A, A * np.float32(12**0.5), "linear", "sqrt(12)"),
        (A, -A, "linear", "-1 times"),
        (A, A - 1, "norm", "smaller by one"),
        (A, A.astype(ml_dtypes.bfloat16).astype(np.float32), "linear", "bfloat16"),
        (A, A.astype(np.float16).astype(np.float32), "linear", "float16"),
        (A, np.zeros_like(A), "linear", "zeros"),
        (A, np.ones_like(A), "norm", "ones"),
        (GATES, GATES.reshape(4, 4, 5)[[0, 1, 3, 2]].reshape(16, 5), "recurrent", "i,f,o,g"),
        (
            A,
            A.reshape(3, 4, 12).swapaxes(0, 1).reshape(12, 12),
            "linear",
            "flattened pixels before channels",
        ),
        (A, A.reshape(12, 3, 4).swapaxes(1, 2).reshape(12, 12), "linear", "3 heads of 4"),
        (A, A.reshape(12, 3, 2, 2).swapaxes(2, 3).reshape(12, 12), "linear", "RoPE"),
        (A, A[np.random.RandomState(0).permutation(12)], "linear", "axis 0, in another order"),
    ],
)
def test_a_tensor_is_diagnosed(a: np.ndarray, b: np.ndarray, kind: str, words: str) -> None:
    said = explain_tensor("a.weight", a, b, OTHERS, kind)
    assert said is not None
    assert words in said.diagnosis


def test_biases_that_were_added_up_are_told_from_others() -> None:
    others = {"gru.bias_hh": OTHER_BIAS}
    said = explain_tensor("gru.bias_ih", BIAS, BIAS + OTHER_BIAS, others, "recurrent")
    assert said is not None
    assert "sum of itself and gru.bias_hh" in said.diagnosis
    partly = BIAS + OTHER_BIAS * np.repeat([1, 1, 0], 4).astype(np.float32)
    said = explain_tensor("gru.bias_ih", BIAS, partly, others, "recurrent")
    assert said is not None
    assert "sum, sum, own" in said.diagnosis


def test_nothing_is_said_of_equal_tensors_and_of_noise() -> None:
    assert explain_tensor("a", A, A.copy(), OTHERS) is None
    noisy = A + 1e-3 * probe.weight("noise", A.shape)
    assert explain_tensor("a", A, noisy, OTHERS) is None
    one = A.copy()
    one[3, 4] += 1
    assert explain_tensor("a", A, one, OTHERS) is None


def test_a_copy_of_a_tensor_that_is_right_is_not_swapped() -> None:
    """Nothing stands in its place: it only has other values."""
    held = OTHERS["b.weight"].copy()
    swapped = explain_tensor("a.weight", A, held, OTHERS)
    assert swapped is not None
    assert swapped.cause == "swapped"
    copied = explain_tensor("a.weight", A, held, OTHERS, copied=["b.weight"])
    assert copied is not None
    assert copied.cause == "values"
