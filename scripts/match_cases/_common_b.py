"""Helpers of the cases of letter b: random values for a torch module, and the usual Flax spellings of its parts.

Names on the Flax side are written with '/' between levels until `finish` orders them and joins them by dots.
"""

import contextlib
import glob
import io
import tempfile

import numpy as np


def arrays(model, ties=None, saved=False):
    """name -> float32 random normals, all different, shaped like the module's state_dict (saved: as its file holds it)."""
    if saved:
        from safetensors import safe_open

        with tempfile.TemporaryDirectory() as d:
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                model.save_pretrained(d)
            with safe_open(glob.glob(d + "/*.safetensors")[0], "np") as f:
                shapes = {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}
    else:
        shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    ties = ties or {}
    own = [k for k in shapes if k not in ties]
    rng = np.random.default_rng(0)
    n = sum(int(np.prod(shapes[k])) for k in own)
    x = rng.standard_normal(n).astype(np.float32)
    while True:
        again = np.setdiff1d(np.arange(n), np.unique(x, return_index=True)[1])
        if not len(again):
            break
        x[again] = rng.standard_normal(len(again)).astype(np.float32)
    cuts = np.cumsum([int(np.prod(shapes[k])) for k in own])[:-1]
    t = {k: v.reshape(shapes[k]) for k, v in zip(own, np.split(x, cuts))}
    return {k: t[ties.get(k, k)].copy() for k in shapes}


def layers(t, prefix):
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in t if k.startswith(prefix))


def finish(out, order="jax"):
    """order: 'jax' (dicts, by key), 'nnx' (list indices as numbers), 'eqx' (fields as declared)."""
    if order == "jax":
        keys = sorted(out, key=lambda k: k.split("/"))
    elif order == "nnx":
        keys = sorted(
            out, key=lambda k: [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in k.split("/")]
        )
    else:
        keys = list(out)
    return {k.replace("/", "."): np.array(out[k], order="C") for k in keys}


def put(out, prefix, part):
    for k, v in part.items():
        out[prefix + "/" + k] = v


def nest(**parts):
    """nest(ln={...}, mlp={...}) -> one flat dict with 'ln/..', 'mlp/..'."""
    out = {}
    for k, v in parts.items():
        put(out, k, v)
    return out


def stack(dicts, axis=0):
    return {k: np.stack([d[k] for d in dicts], axis) for k in dicts[0]}


def _bias(t, p, as_=lambda b: b):
    return {"bias": as_(t[p + ".bias"])} if p + ".bias" in t else {}


def norm(t, p):
    return {"scale": t[p + ".weight"], "bias": t[p + ".bias"]}


def dense(t, p):
    return {"kernel": t[p + ".weight"].T, **_bias(t, p)}


def conv(t, p):
    """(out, in, *space) -> (*space, in, out)"""
    w = t[p + ".weight"]
    return {"kernel": w.transpose(*range(2, w.ndim), 1, 0), **_bias(t, p)}


def embed(t, p):
    return {"embedding": t[p + ".weight"]}


def plain(t, p):
    """weight and bias as torch has them (Equinox)."""
    return {"weight": t[p + ".weight"], **_bias(t, p)}


def to_heads(t, p, h):
    """projection to heads: kernel (d, heads, head_dim), bias (heads, head_dim)"""
    w = t[p + ".weight"].T
    return {"kernel": w.reshape(w.shape[0], h, -1), **_bias(t, p, lambda b: b.reshape(h, -1))}


def from_heads(t, p, h):
    """projection from heads: kernel (heads, head_dim, d), bias (d,)"""
    w = t[p + ".weight"].T
    return {"kernel": w.reshape(h, -1, w.shape[1]), **_bias(t, p)}


def mhdpa(t, p, h, q="q_proj", k="k_proj", v="v_proj", o="out_proj"):
    """flax.linen.MultiHeadDotProductAttention: query/key/value/out"""
    return nest(
        query=to_heads(t, p + q, h),
        key=to_heads(t, p + k, h),
        value=to_heads(t, p + v, h),
        out=from_heads(t, p + o, h),
    )


def hax(part):
    """The same arrays under Haliax/Equinox names: kernel, scale and embedding are all called weight."""
    return {
        "/".join(
            k.split("/")[:-1]
            + [
                {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(
                    k.split("/")[-1], k.split("/")[-1]
                )
            ]
        ): v
        for k, v in part.items()
    }
