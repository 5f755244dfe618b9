"""A JAX process that loads onto its devices, for tests/test_sharding.py: several devices, and what
JAX is told of other processes, are settled before it starts.

`python sharding_process.py FOLDER [PROCESS PORT]`: of one process, or of two.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import convert
import zoo

P = PartitionSpec
_read = [0]


def count() -> None:
    """Count the bytes that are read."""
    real = os.preadv

    def preadv(fd: int, buffers: Any, *rest: Any) -> int:
        n = real(fd, buffers, *rest)
        _read[0] += n
        return n

    os.preadv = preadv


def spread(name: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Over both axes of the mesh: the last axes that divide."""
    spec: list[str | None] = [None] * len(shape)
    for mesh_axis, n in (("model", 4), ("data", 2)):
        free = [a for a, s in enumerate(shape) if s % n == 0 and spec[a] is None]
        if free:
            spec[free[-1]] = mesh_axis
    return P(*spec)


def state_of(module: Any) -> dict[str, Any]:
    """Every tensor, random keys aside."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngState)))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def share(module: Any) -> int:
    """Bytes that this process holds, copies aside."""
    total = 0
    for array in state_of(module).values():
        parts = {str(s.index): s.data.nbytes for s in array.addressable_shards}
        total += sum(parts.values())
    return total


def compare(module: Any, meant: Any) -> None:
    """Each shard has the bits of its part of the whole."""
    expected = state_of(meant)
    for name, array in state_of(module).items():
        whole = np.asarray(expected[name])
        assert array.shape == whole.shape, name
        assert array.dtype == whole.dtype, name
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == whole[shard.index].tobytes(), name


def load(path: Path, mesh: Mesh, limit: float, **told: Any) -> Any:
    """Sharded, and held against the same unsharded; how much of its share it has read at most."""
    meant = zoo.load(path, "flax", **told)
    _read[0] = 0
    net = zoo.load(path, "flax", sharding=(mesh, spread), **told)
    assert _read[0] > 0.9 * share(net), (path.name, _read[0], share(net))
    assert _read[0] <= limit * share(net), (path.name, _read[0], share(net))
    compare(net, meant)
    for name, array in state_of(net).items():
        assert array.sharding.is_equivalent_to(
            NamedSharding(mesh, spread(name, array.shape)), array.ndim
        )
    return net


def main() -> None:
    folder, several = Path(sys.argv[1]), len(sys.argv) > 2
    if several:
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", 2, int(sys.argv[2]))
    count()
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    files = [path for path in sorted(folder.iterdir()) if path.suffix != ".json"]
    for path in files if not several else files[::2]:
        load(path, mesh, 1.1)
    forward(folder, mesh)
    if not several:
        ways(folder, mesh)
    print("done")


def forward(folder: Path, mesh: Mesh) -> None:
    """It computes as it lies, and gives what it gives on one device."""
    net = zoo.load(folder / "wide.safetensors", "flax", sharding=(mesh, spread))
    x = np.linspace(-1, 1, 4 * 256, dtype=np.float32).reshape(4, 256)
    meant = zoo.load(folder / "wide.safetensors", "flax")(x)
    given = jax.make_array_from_callback(x.shape, NamedSharding(mesh, P()), lambda i: x[i])
    whole = NamedSharding(mesh, P())
    graph, state = nnx.split(net)
    made = jax.jit(lambda s, x: nnx.merge(graph, s)(x), out_shardings=whole)(state, given)
    here = np.asarray(made.addressable_data(0))
    np.testing.assert_allclose(here, np.asarray(meant), rtol=1e-4, atol=1e-4)


class Net(nnx.Module):
    """Somebody's own definition."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        for i, (a, b) in enumerate(itertools.pairwise((256, 512, 512, 64))):
            setattr(self, f"fc{i + 1}", nnx.Linear(a, b, rngs=rngs))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def ways(folder: Path, mesh: Mesh) -> None:
    """The same said otherwise, and into a definition."""
    path = folder / "wide.safetensors"
    meant = zoo.load(path, "flax")
    rules = [(r"fc1\.kernel", P(None, "model")), ("kernel", P("model")), (".*", P())]
    abstract = nnx.state(nnx.eval_shape(lambda: zoo.load(path, "flax")))
    tree = jax.tree.map(lambda _: NamedSharding(mesh, P()), abstract)
    specs = nnx.get_partition_spec(abstract)
    every = {n: NamedSharding(mesh, P()) for n in state_of(meant)}
    for way in (
        (mesh, rules),
        NamedSharding(mesh, P()),
        (mesh, P()),
        (mesh, specs),
        (mesh, lambda name, shape: P("data") if name.endswith("kernel") else None),
        lambda name, shape: NamedSharding(mesh, P()),
        tree,
        every,
        jax.sharding.SingleDeviceSharding(jax.devices()[3]),
    ):
        net = zoo.load(path, "flax", sharding=way)
        compare(net, meant)
    held = zoo.load(path, "flax", sharding=(mesh, rules)).fc1.kernel.get_value()
    assert [shard.data.shape for shard in held.addressable_shards] == [(256, 128)] * 8
    _read[0] = 0
    own = convert.load(path, "flax", Net, sharding=(mesh, rules))
    assert _read[0] <= 1.1 * share(own)
    kernel, expected = own.fc2.kernel.get_value(), meant.fc2.kernel.get_value()
    assert kernel.sharding.spec == P("model")
    assert np.asarray(kernel).tobytes() == np.asarray(expected).tobytes()
    empty = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    filled = convert.load(path, "flax", empty, sharding=(mesh, rules)).fc2.kernel.get_value()
    assert filled.sharding.spec == P("model")
    # The devices of one host share memory: what is given away is nobody else's.
    whole = zoo.load(path, "flax", sharding=NamedSharding(mesh, P())).fc2.kernel.get_value()
    made = jax.jit(lambda x: x + 1, donate_argnums=0)(whole)
    for shard in made.addressable_shards:
        assert np.asarray(shard.data).tobytes() == (np.asarray(expected) + 1).tobytes()
    new = zoo.load(path, "flax", sharding=(mesh, P()), sizes=(256, 512, 512, 128))
    assert new.fc3.kernel.get_value().shape == (512, 128)


if __name__ == "__main__":
    main()
