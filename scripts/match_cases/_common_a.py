"""Shared by the cases of author a: random weights, reading what save_pretrained writes, and a few axis moves."""

import os
import tempfile

import numpy as np


def _fill(shapes, ties):
    """Seeded normals, all different from each other; a tied name repeats its twin."""
    own = [n for n in shapes if n not in ties]
    sizes = [int(np.prod(shapes[n])) for n in own]
    rng = np.random.default_rng(0)
    flat = rng.standard_normal(sum(sizes)).astype(np.float32)
    while True:
        _, first = np.unique(flat, return_index=True)
        again = np.setdiff1d(np.arange(flat.size), first)
        if not again.size:
            break
        flat[again] = rng.standard_normal(again.size).astype(np.float32)
    parts = dict(zip(own, np.split(flat, np.cumsum(sizes)[:-1])))
    out = {n: parts[ties.get(n, n)].reshape(shapes[ties.get(n, n)]).copy() for n in shapes}
    assert all(out[n].shape == tuple(shapes[n]) for n in shapes)
    return out


def state(model, ties={}):
    """The module's state_dict, refilled."""
    return _fill({n: tuple(v.shape) for n, v in model.state_dict().items()}, ties)


def saved(model):
    """Names and shapes as the file that save_pretrained writes (published spelling, ties dropped), refilled."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as d:
        model.save_pretrained(d)
        with safe_open(os.path.join(d, "model.safetensors"), "np") as f:
            return _fill({n: tuple(f.get_slice(n).get_shape()) for n in f.keys()}, {})


def heads_in(w, h):
    """torch (h * hd, d) -> (d, h, hd)."""
    return w.T.reshape(w.shape[1], h, -1)


def heads_out(w, h):
    """torch (d, h * hd) -> (h, hd, d)."""
    return w.T.reshape(h, -1, w.shape[0])


def pair_rope(w, h):
    """Rows of each head from two halves to neighbouring pairs (rotary of the interleaved kind)."""
    hd = w.shape[0] // h
    return w.reshape(h, 2, hd // 2, -1).swapaxes(1, 2).reshape(w.shape)


def tree(flat):
    """The order that JAX gives to nested dicts: by key at each level."""
    return in_order(dict(sorted(flat.items(), key=lambda kv: tuple(kv[0].split(".")))))


def in_order(flat):
    """The order as written (Equinox modules: by field)."""
    return {n: np.array(v, order="C") for n, v in flat.items()}
