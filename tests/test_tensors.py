"""convert.to_jax and convert.to_torch: every dtype, the same bits, shared memory where promised."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import convert
from zoo.containers.errors import UsageError

NARROW = ["float32", "float16", "bfloat16", "int32", "int16", "int8", "uint8", "bool", "complex64"]
NARROW += ["uint16", "uint32", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
WIDE = ["float64", "int64", "uint64", "complex128"]
SHAPES: list[tuple[int, ...]] = [(3, 5), (), (0, 4), (1,), (2, 3, 4)]


def random_tensor(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits (but for bool, which has two values)."""
    kind = getattr(torch, dtype)
    size = int(np.prod(shape)) * kind.itemsize
    raw = np.random.default_rng(size).integers(0, 2 if dtype == "bool" else 256, size, np.uint8)
    return (
        torch.from_numpy(raw).view(kind).reshape(shape) if size else torch.zeros(shape, dtype=kind)
    )


def torch_bits(t: torch.Tensor) -> tuple[Any, ...]:
    flat = t.contiguous().reshape(-1).view(torch.uint8).numpy()
    return str(t.dtype), tuple(t.shape), flat.tobytes()


def jax_bits(a: jax.Array) -> tuple[Any, ...]:
    return f"torch.{a.dtype.name}", a.shape, np.asarray(a).tobytes()


@pytest.mark.parametrize("dtype", NARROW + WIDE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_dtype_there_and_back(dtype: str, shape: tuple[int, ...]) -> None:
    with jax.enable_x64(dtype in WIDE):
        t = random_tensor(dtype, shape)
        a = convert.to_jax(t)
        assert isinstance(a, jax.Array)
        assert jax_bits(a) == torch_bits(t)
        back = convert.to_torch(a)
        assert torch_bits(back) == torch_bits(t)


@pytest.mark.parametrize("dtype", WIDE)
def test_jax_may_not_cut_64_bits(dtype: str) -> None:
    with pytest.raises(UsageError, match=rf"\['w'\]\[1\] is {dtype}"):
        convert.to_jax({"w": [torch.zeros(1), random_tensor(dtype, (2,))]})


def test_memory_is_shared_where_it_can_be() -> None:
    t = torch.arange(4096, dtype=torch.float32)
    a = convert.to_jax(t)
    assert a.unsafe_buffer_pointer() == t.data_ptr()
    assert convert.to_torch(a).data_ptr() == t.data_ptr()
    strided = torch.arange(4096, dtype=torch.float32).reshape(64, 64).t()
    assert (np.asarray(convert.to_jax(strided)) == strided.numpy()).all()


def test_views_gradients_and_lazy_bits() -> None:
    t = torch.randn(6, 4, requires_grad=True)[::2, 1:]
    assert (np.asarray(convert.to_jax(t)) == t.detach().numpy()).all()
    z = torch.randn(3, dtype=torch.complex64).conj()
    assert (np.asarray(convert.to_jax(z)) == z.resolve_conj().numpy()).all()


class Pair(NamedTuple):
    left: Any
    right: Any


def test_trees_keep_their_shape_and_everything_else() -> None:
    tree = OrderedDict(a=[torch.ones(2), (torch.zeros(1), 3)], b=Pair(torch.ones(1), "x"), c=None)
    there = convert.to_jax(tree)
    assert isinstance(there, OrderedDict)
    assert isinstance(there["b"], Pair)
    assert there["a"][1][1] == 3
    assert there["b"].right == "x"
    assert there["c"] is None
    back = convert.to_torch(there)
    assert (back["a"][0] == tree["a"][0]).all()
    assert isinstance(back["a"][1], tuple)


def test_numpy_arrays_become_tensors_of_their_own() -> None:
    a = np.arange(6).reshape(2, 3).T
    t = convert.to_torch(a)
    assert (t.numpy() == a).all()
    t += 1
    assert a[0, 0] == 0
    read_only = np.broadcast_to(np.float32(3), (2, 2))
    assert (convert.to_torch(read_only) == 3).all()


def test_dtypes_that_torch_lacks_are_refused() -> None:
    with pytest.raises(UsageError, match="int4, which torch does not have"):
        convert.to_torch(jnp.zeros(2, jnp.int4))


def test_foreign_byte_order_and_containers() -> None:
    a = np.arange(3, dtype=">f4")
    assert convert.to_torch(a).tolist() == [0.0, 1.0, 2.0]
    from collections import defaultdict

    from flax import nnx

    tree = defaultdict(list, x=torch.ones(2))
    assert convert.to_jax(tree)["missing"] == []
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(UsageError, match="State, which is not looked into"):
        convert.to_torch({"s": state})
    with pytest.raises(UsageError, match="meta"):
        convert.to_jax(torch.ones(2, device="meta"))


def test_all_of_a_loaded_model_is_shared() -> None:
    """Memory that torch allocated is aligned as JAX wants it."""
    import zoo

    model = zoo.create("mnist_cnn", framework="torch")
    state = model.state_dict()
    arrays = convert.to_jax(state)
    assert all(arrays[n].unsafe_buffer_pointer() == t.data_ptr() for n, t in state.items())
