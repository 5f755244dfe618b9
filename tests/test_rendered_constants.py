"""Constants as NumPy text: there and back, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.porting.rendering.constants import array_text

F = np.float32
LOWEST = float(np.finfo(F).min)


def window(h: int, w: int) -> np.ndarray:
    """Swin's table, as its authors make it."""
    places = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij")).reshape(2, -1)
    apart = places[:, :, None] - places[:, None]
    made: np.ndarray = (apart[0] + h - 1) * (2 * w - 1) + apart[1] + w - 1
    return made


def window_and_class(h: int, w: int) -> np.ndarray:
    """BEiT's, with a class token."""
    pairs = (2 * h - 1) * (2 * w - 1)
    table = np.zeros((h * w + 1,) * 2, np.int64)
    table[1:, 1:], table[0], table[:, 0], table[0, 0] = window(h, w), pairs, pairs + 1, pairs + 2
    return table


def waves(n: int, d: int) -> np.ndarray:
    """Sinusoids, sine and cosine in turn."""
    angle = np.arange(n)[:, None] / 10000 ** (2 * (np.arange(d) // 2) / d)
    angle[:, 0::2], angle[:, 1::2] = np.sin(angle[:, 0::2]), np.cos(angle[:, 1::2])
    return angle


TEXTS: dict[str, np.ndarray] = {
    "np.zeros((3, 4), np.float32)": np.zeros((3, 4), F),
    "np.zeros((0, 2))": np.zeros((0, 2)),
    "np.ones(5)": np.ones(5),
    "np.full(4, -0.0, np.float32)": -np.zeros(4, F),
    "np.full((2, 3), -np.inf, np.float32)": np.full((2, 3), -np.inf, F),
    "np.full(3, np.nan)": np.full(3, np.nan),
    "np.array(3)": np.array(3),
    "np.array(0.1, np.float32)": np.array(0.1, F),
    "np.array([True, False, True])": np.array([True, False, True]),
    "np.array([3, 5, 9], np.uint8)": np.array([3, 5, 9], np.uint8),
    "np.array([(1+2j), 3j], np.complex64)": np.array([1 + 2j, 3j], np.complex64),
    "np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]": np.array(
        [0.485, 0.456, 0.406], F
    )[:, None, None],
    "np.arange(512)[None]": np.arange(512)[None],
    "np.arange(7, dtype=np.float32)": np.arange(7, dtype=F),
    "np.arange(3, 28, 4)": np.arange(3, 30, 4),
    "np.arange(10)[::-1]": np.arange(10)[::-1],
    "np.arange(5, -6, -2)": np.arange(5, -6, -2),
    "np.arange(60).reshape(3, 20)": np.arange(60).reshape(3, 20),
    "np.arange(40, dtype=np.float32).astype(jnp.bfloat16)": np.arange(40).astype(jnp.bfloat16),
    "(np.arange(40, dtype=np.float32) + 0.5) / 40": (np.arange(40, dtype=F) + 0.5) / 40,
    "np.linspace(-1.0, 1.0, 7, dtype=np.float32)": np.linspace(-1, 1, 7, dtype=F),
    "(np.arange(40) * 0.07).astype(np.float32)": (np.arange(40) * 0.07).astype(F),
    "np.repeat(np.arange(40)[None], 3, axis=0)": np.repeat(np.arange(40)[None], 3, 0),
    "np.eye(6, dtype=np.float32)": np.eye(6, dtype=F),
    "np.tril(np.ones((64, 64), bool))[None, None]": np.tril(np.ones((64, 64), bool))[None, None],
    "np.tril(np.ones((6, 8), np.int64), 2)": np.tril(np.ones((6, 8), np.int64), 2),
    "np.triu(np.full((77, 77), -np.inf, np.float32), 1)": np.triu(np.full((77, 77), -np.inf, F), 1),
    "np.triu(np.full((5, 5), np.finfo(np.float32).min, np.float32), 1)": np.triu(
        np.full((5, 5), LOWEST, F), 1
    ),
    "np.where(np.tri(6, 6, 0, dtype=bool), 1.0, -1.0).astype(np.float32)": np.where(
        np.tri(6, dtype=bool), 1, -1
    ).astype(F),
    "np.subtract.outer(np.arange(40), np.arange(40))": np.arange(40)[:, None] - np.arange(40),
    "np.clip(np.arange(50) - np.arange(50)[:, None], -8, 8) + 8": np.clip(
        np.arange(50) - np.arange(50)[:, None], -8, 8
    )
    + 8,
    "np.hanning(401)[:-1].astype(np.float32)": np.hanning(401)[:-1].astype(F),
    "1 / 500000.0 ** (np.arange(0, 64, 2) / 64)": 1 / 500000 ** (np.arange(0, 64, 2) / 64),
}


@pytest.mark.parametrize("text", list(TEXTS))
def test_a_constant_is_written_as_somebody_would(text: str) -> None:
    assert array_text(TEXTS[text]) == text


TABLES: dict[str, np.ndarray] = {
    "swin": window(7, 7),
    "swin_flat": window(8, 4).reshape(-1),
    "beit": window_and_class(6, 4),
    "waves": waves(60, 64),
    "waves32": waves(60, 64).astype(F),
    "halves": np.concatenate([waves(60, 64)[:, 0::2], waves(60, 64)[:, 1::2]], -1).astype(F),
    "rotary": (1.0 / 10000 ** (torch.arange(0, 64, 2).float() / 64)).numpy(),
    "rates": torch.exp(torch.arange(0, 80, 2).float() * (-math.log(10000.0) / 80)).numpy(),
    "timesteps": torch.exp(
        -math.log(10000) * torch.arange(0, 40, dtype=torch.float32) / 40
    ).numpy(),
    "mask_and_axis": np.triu(np.ones((33, 33), bool), 1)[None],
    "numbers": np.array([[1.5, -2], [1e-30, 3e20]], F),
    "float16": np.array([0.1, 65504], np.float16),
    "fp8": np.array([0.5, 0.25]).astype(jnp.float8_e4m3fn),
}


@pytest.mark.parametrize("name", list(TABLES))
def test_a_constant_comes_back_bit_for_bit(name: str) -> None:
    a = TABLES[name]
    text = array_text(a)
    assert text is not None
    back: Any = np.asarray(eval(text, {"np": np, "jnp": jnp}))
    assert (back.dtype, back.shape, back.tobytes()) == (a.dtype, a.shape, a.tobytes())


def test_what_is_no_formula_is_stored() -> None:
    noise = np.random.default_rng(0).standard_normal(40)
    off = window(7, 7)
    off[3, 4] += 1
    triangle = np.tril(np.ones((40, 40), F))
    triangle[5, 20] = 1
    ulp = np.arange(40, dtype=F) / 40
    ulp[7] = np.nextafter(ulp[7], F(1))
    for a in (noise, off, triangle, ulp, np.arange(40) % 7 == 0):
        assert array_text(a) is None
