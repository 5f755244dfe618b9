"""zoo.containers.orbax_dir, with Orbax itself as the judge in both directions."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from orbax.checkpoint.experimental import v1
from orbax.checkpoint.experimental.v1 import training

from zoo.containers import dtypes, orbax_dir
from zoo.containers.base import TensorInfo
from zoo.containers.errors import (
    CorruptInput,
    MissingExtra,
    NoSpace,
    UnsafeInput,
    UsageError,
    ZooError,
)
from zoo.containers.orbax_dir import OrbaxReader, OrbaxWriter, is_orbax
from zoo.containers.orbax_dir import write as orbax_write
from zoo.containers.orbax_dir import zarr as orbax_zarr

pytestmark = [
    # Orbax: the newest releases would have `load` said for `load_pytree`; both are promised.
    pytest.mark.filterwarnings("ignore:Use `load` instead:DeprecationWarning"),
]

Tree = dict[str, Any]


def bits(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    array = np.asarray(array)
    return array.dtype.name, array.shape, array.tobytes()


def everything() -> dict[str, np.ndarray]:
    """Random bits in every dtype: NaNs with payloads, infinities, denormals. And -0.0."""
    rng = np.random.default_rng(7)
    arrays = {}
    for code, dtype in dtypes.NUMPY.items():
        raw = rng.bytes(6 * dtype.itemsize) if code != "BOOL" else bytes([0, 1, 1, 0, 0, 1])
        arrays[f"m_{code}"] = np.frombuffer(raw, dtype).reshape(2, 3)
        arrays[f"s_{code}"] = np.frombuffer(raw[: dtype.itemsize], dtype).reshape(())
    arrays["zeros"] = np.zeros((3, 4), np.float32)
    arrays["minus"] = np.array([-0.0, 0.0, -0.0])
    arrays["nan"] = np.array([0x7FC12345, 0xFF812345], np.uint32).view(np.float32)
    arrays["nan16"] = np.array([0x7FC1, 0xFF81], np.uint16).view(ml_dtypes.bfloat16)
    return arrays


def save_v0(checkpointer: Any) -> Callable[[Path, Tree], None]:
    def save(path: Path, tree: Tree) -> None:
        with checkpointer() as c:
            c.save(path, tree)

    return save


def save_composite(path: Path, tree: Tree) -> None:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as c:
        c.save(path, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))


def save_manager(path: Path, tree: Tree) -> None:
    with ocp.CheckpointManager(path) as manager:
        manager.save(3, args=ocp.args.PyTreeSave(tree))
        manager.wait_until_finished()


SAVE: dict[str, Callable[[Path, Tree], None]] = {
    "v1": v1.save,
    "standard": save_v0(ocp.StandardCheckpointer),
    "pytree": save_v0(ocp.PyTreeCheckpointer),
    "files": save_v0(lambda: ocp.PyTreeCheckpointer(use_ocdbt=False)),
    "zarr3": save_v0(lambda: ocp.PyTreeCheckpointer(use_zarr3=True)),
    "files-zarr3": save_v0(lambda: ocp.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=True)),
    "composite": save_composite,
    "manager": save_manager,
}
LOAD: dict[str, Callable[[Path], Any]] = {
    "v1.load": v1.load,
    "v1.load_pytree": v1.load_pytree,
    "standard": lambda path: ocp.StandardCheckpointer().restore(path),
    "pytree": lambda path: ocp.PyTreeCheckpointer().restore(path),
}


def write(
    path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> Path:
    header = {n: TensorInfo(dtypes.code_of(a.dtype), a.shape) for n, a in arrays.items()}
    with OrbaxWriter(path, header, metadata or {}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
        writer.finish()
    return path


def read_all(path: Path) -> dict[str, np.ndarray]:
    with OrbaxReader(path) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert {n: bits(a) for n, a in got.items()} == {n: bits(a) for n, a in want.items()}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {n: a for k, v in tree.items() for n, a in flat(v, f"{prefix}{k}.").items()}


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def fails(kind: type[ZooError], work: Callable[[], object], *words: str) -> None:
    """`work` raises exactly `kind`, in two lines that hold `words`."""
    with pytest.raises(ZooError) as caught:
        work()
    assert type(caught.value) is kind, caught.value
    assert str(caught.value).count("\n") == 1, str(caught.value)
    for word in words:
        assert word in str(caught.value)


def attempt(path: Path, want: dict[str, np.ndarray]) -> str | None:
    """Read it all and hold it against `want`; the message where the reader refuses instead."""
    try:
        got = read_all(path)
    except CorruptInput as e:
        return str(e)
    assert_same(got, want)
    return None


# Reading what Orbax wrote.


@pytest.mark.parametrize("mode", SAVE)
def test_reads_a_tree_of_all_kinds(mode: str, tmp_path: Path) -> None:
    kernel = np.arange(12, dtype=np.float32).reshape(3, 4)
    tree = {
        "fc1": {"kernel": jnp.asarray(kernel), "bias": np.zeros(4, np.float32)},
        "layers": [np.ones(2, np.int8), {"x": np.array(2.5)}],
        "pair": (np.ones(1, bool), jnp.ones(3, jnp.bfloat16)),
        "ints": {2: np.full(2, 2, np.uint16), 10: np.full(2, 10, np.uint16)},
        "a.dot": np.ones(2),
        "mlp/~/linear": {"w": np.full(3, 7.0)},
        "step": 3,
        "rate": 0.5,
        "none": None,
        "empty": {},
    }
    extras = {"step": 3, "rate": 0.5, "none": None, "empty": {}}
    if mode != "standard":  # whose handler refuses strings
        tree["note"] = extras["note"] = "hello"
    SAVE[mode](tmp_path / "c", tree)
    want = {
        "fc1.kernel": kernel,
        "fc1.bias": tree["fc1"]["bias"],
        "layers.0": tree["layers"][0],
        "layers.1.x": np.array(2.5),
        "pair.0": np.ones(1, bool),
        "pair.1": np.ones(3, ml_dtypes.bfloat16),
        "ints.2": tree["ints"][2],
        "ints.10": tree["ints"][10],
        "a.dot": np.ones(2),
        "mlp/~/linear.w": np.full(3, 7.0),
    }
    assert is_orbax(tmp_path / "c")
    assert_same(read_all(tmp_path / "c"), want)
    reader = OrbaxReader(tmp_path / "c")
    assert reader.container == "orbax"
    assert reader.extras == extras
    assert reader.tensors["fc1.kernel"] == TensorInfo("F32", (3, 4))
    assert reader.notices == (["took step 3, the latest of: 3"] if mode == "manager" else [])


@pytest.mark.parametrize("mode", ["v1", "pytree", "files", "files-zarr3"])
def test_reads_every_dtype(mode: str, tmp_path: Path) -> None:
    SAVE[mode](tmp_path / "c", everything())
    assert_same(read_all(tmp_path / "c"), everything())


def test_arrays_are_the_callers_own(tmp_path: Path) -> None:
    SAVE["v1"](tmp_path / "c", {"a": np.arange(6.0).reshape(2, 3)})
    reader = OrbaxReader(tmp_path / "c")
    first, second = reader.read("a"), reader.read("a")
    assert first.flags.c_contiguous
    assert first.flags.writeable
    first[:] = 0
    assert [second[1, 2], reader.read("a")[1, 2]] == [5.0, 5.0]


def test_sharded_array_is_read_whole(tmp_path: Path) -> None:
    """What several devices write lies in several chunks, the last one padded."""
    script = f"""
import jax, numpy as np, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
x = jax.device_put(np.arange(48, dtype=np.float32).reshape(8, 6), NamedSharding(mesh, P("a", "b")))
with ocp.StandardCheckpointer() as c: c.save({str(tmp_path / "c")!r}, {{"x": x}})
"""
    env = dict(
        os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=4", JAX_PLATFORMS="cpu"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=env, capture_output=True)
    assert_same(read_all(tmp_path / "c"), {"x": np.arange(48, dtype=np.float32).reshape(8, 6)})


def test_items_are_prefixed_only_where_there_are_several(tmp_path: Path) -> None:
    a, m = {"w": np.ones(2), "step": 1}, {"m": np.full(2, 3.0), "count": 5}
    v1.save_checkpointables(tmp_path / "two", {"params": a, "opt": m})
    assert_same(read_all(tmp_path / "two"), {"params.w": np.ones(2), "opt.m": np.full(2, 3.0)})
    assert OrbaxReader(tmp_path / "two").extras == {"params.step": 1, "opt.count": 5}
    v1.save_checkpointables(tmp_path / "one", {"params": a, "info": {"count": 5}})
    assert_same(read_all(tmp_path / "one"), {"w": np.ones(2)})
    assert OrbaxReader(tmp_path / "one").extras == {"step": 1, "info.count": 5}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as c:
        args = {"state": ocp.args.StandardSave(a), "info": ocp.args.JsonSave({"x": 1})}
        c.save(tmp_path / "json", args=ocp.args.Composite(**args))
    assert_same(read_all(tmp_path / "json"), {"w": np.ones(2)})
    assert OrbaxReader(tmp_path / "json").notices == [
        "item info is not a tree of arrays and was left out"
    ]


@pytest.mark.parametrize("prefix", [None, "ckpt"])
def test_manager_root_gives_the_latest_complete_step(prefix: str | None, tmp_path: Path) -> None:
    root = tmp_path / "run"
    options = ocp.CheckpointManagerOptions(step_prefix=prefix)
    with ocp.CheckpointManager(root, options=options) as manager:
        for step in (2, 10, 9):
            tree = {"w": np.full(2, step)}
            manager.save(step, args=ocp.args.StandardSave(tree), force=True)
            manager.wait_until_finished()
    name = (lambda n: f"{prefix}_{n}") if prefix else str
    steps = sorted(int(p.name.split("_")[-1]) for p in root.iterdir())
    assert steps[-1] == 10
    assert_same(read_all(root), {"w": np.full(2, 10)})
    assert_same(read_all(root / name(2)), {"w": np.full(2, 2)})
    os.rename(root / name(10), root / f"{name(10)}.orbax-checkpoint-tmp-7")
    assert_same(read_all(root), {"w": np.full(2, steps[-2])})
    notices = OrbaxReader(root).notices
    assert f"took step {name(steps[-2])}, the latest of" in notices[0]
    assert notices[1] == f"incomplete steps: {name(10)}.orbax-checkpoint-tmp-7"
    for step in steps[:-1]:
        shutil.rmtree(root / name(step))
    assert is_orbax(root)
    fails(CorruptInput, lambda: OrbaxReader(root), str(root), "none of its steps is complete")


def test_v1_training_root(tmp_path: Path) -> None:
    with training.Checkpointer(tmp_path / "run") as c:
        c.save(7, {"w": np.ones(2)})
        c.save(8, {"w": np.zeros(2)})
    assert_same(read_all(tmp_path / "run"), {"w": np.zeros(2)})


@pytest.mark.parametrize("mode", ["v1", "standard"])
def test_nnx_and_linen(mode: str, tmp_path: Path) -> None:
    from flax import linen, nnx

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.fc = nnx.Linear(3, 4, rngs=rngs)
            self.blocks = nnx.List([nnx.BatchNorm(4, rngs=rngs)])

    net = Net(nnx.Rngs(0))
    state = nnx.state(net)
    want = {
        "fc.kernel": net.fc.kernel[...],
        "fc.bias": net.fc.bias[...],
        **{
            f"blocks.0.{n}": getattr(net.blocks[0], n)[...]
            for n in ("scale", "bias", "mean", "var")
        },
    }
    SAVE[mode](tmp_path / "pure", nnx.to_pure_dict(state))
    assert_same(read_all(tmp_path / "pure"), want)
    SAVE[mode](tmp_path / "state", state)
    stored = read_all(tmp_path / "state")
    leaf = next(iter(stored)).removeprefix("blocks.0.bias")  # ".value", or whatever Flax makes it
    assert_same(stored, {n + leaf: a for n, a in want.items()})

    class Small(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return linen.BatchNorm(use_running_average=True)(linen.Dense(2)(x))

    variables = Small().init(jax.random.key(0), jnp.ones((1, 3)))
    SAVE[mode](tmp_path / "linen", variables)
    assert_same(read_all(tmp_path / "linen"), flat(variables))
    assert "params.Dense_0.kernel" in OrbaxReader(tmp_path / "linen").tensors


# Orbax reading what we wrote.


@pytest.mark.parametrize("load", LOAD)
def test_orbax_reads_every_dtype(load: str, tmp_path: Path) -> None:
    arrays = {f"a.{n}": a for n, a in everything().items()}
    write(tmp_path / "c", arrays)
    for file in ("config.json", "certificate.json"):
        (tmp_path / "c" / file).write_text('{"x": 1}')
    assert_same(flat(LOAD[load](tmp_path / "c")), arrays)
    assert_same(read_all(tmp_path / "c"), arrays)
    assert is_orbax(tmp_path / "c")
    assert v1.is_orbax_checkpoint(tmp_path / "c")


def test_orbax_restores_into_a_target(tmp_path: Path) -> None:
    arrays = {"fc.kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "fc.0": np.arange(3)}
    arrays["fc.0"] = arrays["fc.0"].astype(np.int32)
    write(tmp_path / "c", arrays)
    target = {"fc": {"kernel": jnp.zeros((2, 3)), "0": jnp.zeros(3, jnp.int32)}}
    for tree in (
        v1.load(tmp_path / "c", target),
        ocp.StandardCheckpointer().restore(tmp_path / "c", target),
    ):
        assert isinstance(tree["fc"]["kernel"], jax.Array)
        assert_same(flat(tree), arrays)


@pytest.mark.parametrize("order", ["C", "F"])
def test_chunks_and_orders(order: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax_write, "_CHUNK", 256)
    rng = np.random.default_rng(0)
    shapes = [(7, 13), (2, 3, 65), (1000,), (3, 200), (5, 1, 3, 30), ()]
    arrays = {f"x{i}": rng.standard_normal(s) for i, s in enumerate(shapes)}
    write(tmp_path / "c", {n: np.asarray(a, order=order) for n, a in arrays.items()})
    assert_same(read_all(tmp_path / "c"), arrays)
    assert_same(flat(v1.load(tmp_path / "c")), arrays)
    files = [p for p in (tmp_path / "c").glob("x*/*") if p.name.startswith("c")]
    assert sum(p.parent.name == "x1" for p in files) == 2 * 3 * 3  # of 32, 32 and 1 element
    assert max(p.stat().st_size for p in files) <= 256
    with OrbaxReader(tmp_path / "c") as reader:
        region = (slice(1, 2), slice(0, 3), slice(30, 64))
        assert bits(reader.read("x1", region)) == bits(np.ascontiguousarray(arrays["x1"][region]))


@pytest.mark.parametrize("mode", ["v1", "pytree", "files", "files-zarr3"])
def test_regions_of_what_others_wrote(mode: str, tmp_path: Path) -> None:
    arrays = {"a": np.arange(60.0).reshape(3, 4, 5)}
    SAVE[mode](tmp_path / "c", arrays)
    region = (slice(1, 3), slice(0, 2), slice(4, 5))
    with OrbaxReader(tmp_path / "c") as reader:
        out = np.empty((2, 2, 1))
        assert reader.read("a", region, out) is out
        assert (out == arrays["a"][region]).all()


def test_more_chunks_claimed_than_there_are(tmp_path: Path) -> None:
    """A million of them are not looked for one by one."""
    write(tmp_path / "c", {"a": np.ones(4)})
    edit(
        tmp_path / "c" / "a" / "zarr.json",
        lambda m: m.update(
            shape=[1 << 20],
            chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1]}},
        ),
    )
    with OrbaxReader(tmp_path / "c") as reader:
        assert reader.spans("a") is None


def test_the_callers_buffer_may_be_reused(tmp_path: Path) -> None:
    infos = {name: TensorInfo("F32", (1000,)) for name in "abc"}
    buffer = np.empty(1000, np.float32)
    with OrbaxWriter(tmp_path / "c", infos, {}) as writer:
        for name in "cab":
            buffer[:] = ord(name)
            writer.write(name, buffer)
        buffer[:] = 0
        writer.finish()
    want = {name: np.full(1000, ord(name), np.float32) for name in "abc"}
    assert_same(read_all(tmp_path / "c"), want)


def test_the_tree_does_not_depend_on_the_order(tmp_path: Path) -> None:
    names = ["b.x", "a-b", "a.c", "a.10", "a.9"]
    for i, order in enumerate((names, names[::-1])):
        write(tmp_path / str(i), {n: np.full(2, len(n)) for n in order})
    first, second = ((tmp_path / i / "_METADATA").read_bytes() for i in "01")
    assert first == second
    assert list(OrbaxReader(tmp_path / "0").tensors) == ["a.10", "a.9", "a.c", "a-b", "b.x"]


def test_metadata(tmp_path: Path) -> None:
    metadata = {"zoo.model": "resnet", "zoo.config": '{"a": 1}', "é": "ü"}
    write(tmp_path / "ours", {"a": np.ones(1)}, metadata)
    assert OrbaxReader(tmp_path / "ours").metadata == metadata
    assert v1.metadata(tmp_path / "ours").custom_metadata == metadata
    assert ocp.StandardCheckpointer().metadata(tmp_path / "ours").custom_metadata == metadata
    custom = {"k": "v", "n": [1, 2]}
    v1.save(tmp_path / "v1", {"a": np.ones(1)}, custom_metadata=custom)
    with ocp.StandardCheckpointer() as c:
        c.save(tmp_path / "v0", {"a": np.ones(1)}, custom_metadata=custom)
    for name in ("v1", "v0"):
        assert OrbaxReader(tmp_path / name).metadata == {"k": "v", "n": "[1, 2]"}


names = st.text("ab01_-/~é ", min_size=1, max_size=5).filter(
    lambda s: not orbax_zarr.wrong_name([s])
)
tensors = st.tuples(
    st.sampled_from(sorted(set(dtypes.NUMPY) - {"BOOL"})),
    st.lists(st.integers(1, 4), max_size=4),
    st.integers(0, 2**32),
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.tuples(st.just("t"), names, names), tensors, min_size=1, max_size=5))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, drawn: dict[Any, Any]) -> None:
    arrays = {}
    for path, (code, shape, seed) in drawn.items():
        dtype = dtypes.NUMPY[code]
        raw = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
        arrays[".".join(path)] = np.frombuffer(raw, dtype).reshape(shape)
    path = write(tmp_path_factory.mktemp("h") / "c", arrays)
    assert_same(read_all(path), arrays)
    assert_same(flat(v1.load(path)), arrays)


def test_what_orbax_cannot_hold_is_named_at_once(tmp_path: Path) -> None:
    infos = {
        "fine": TensorInfo("F32", (2,)),
        "none.a": TensorInfo("F32", (0,)),
        "none.b": TensorInfo("I8", (3, 0)),
        "tree": TensorInfo("F32", (1,)),
        "tree.leaf": TensorInfo("F32", (1,)),
        "../up": TensorInfo("F32", (1,)),
    }
    with pytest.raises(ValueError, match="zero size"):  # Orbax's own word for it
        ocp.PyTreeCheckpointer().save(tmp_path / "o", {"none": np.zeros((3, 0))})
    with pytest.raises(UsageError) as caught:
        OrbaxWriter(tmp_path / "c", infos, {})
    assert [d.split(": ")[0] for d in caught.value.details] == ["none.a", "none.b", "tree", "../up"]
    assert "safetensors" in caught.value.advice
    fails(UsageError, lambda: OrbaxWriter(tmp_path / "c", {}, {}), "without tensors")
    assert not (tmp_path / "c").exists()


def test_a_disk_that_fails(tmp_path: Path) -> None:
    """What goes wrong in writing is no fault of any input."""
    with OrbaxWriter(tmp_path / "c", {"a": TensorInfo("F32", (1000,))}, {}) as writer:
        shutil.rmtree(tmp_path / "c")
        (tmp_path / "c").write_text("in the way")
        with pytest.raises(OSError, match="Not a directory"):
            writer.write("a", np.ones(1000, np.float32))


def test_an_existing_directory_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        OrbaxWriter(tmp_path, {"a": TensorInfo("F32", (1,))}, {})
    assert list(tmp_path.iterdir()) == []


def test_unfinished_writing_is_no_checkpoint(tmp_path: Path) -> None:
    infos = {name: TensorInfo("F32", (4,)) for name in "ab"}
    with OrbaxWriter(tmp_path / "c", infos, {}) as writer:
        writer.write("a", np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"never written: \['b'\]"):
        writer.finish()
    fails(CorruptInput, lambda: OrbaxReader(tmp_path / "c"), "holds no Orbax checkpoint")


def test_everything_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: dict[int, bool] = {}  # and whether the commit file was there already
    commit = tmp_path / "c" / "commit_success.txt"
    fsync = os.fsync

    def record(fd: int) -> None:
        synced.setdefault(os.fstat(fd).st_ino, commit.exists())
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record)
    write(tmp_path / "c", {"a": np.ones(1000), "b": np.ones(3)})
    everywhere = [tmp_path, tmp_path / "c", *(tmp_path / "c").rglob("*")]
    assert len(everywhere) >= 7
    late = {p: synced[p.stat().st_ino] for p in everywhere}
    assert [p for p in everywhere if late[p]] == [commit]


def test_full_disk_and_full_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device [source ...")

    fails(NoSpace, lambda: orbax_zarr.guarded(full, "x/y"), "x/y")
    SAVE["zarr3"](tmp_path / "c", {"a": np.ones(4)})
    reader = OrbaxReader(tmp_path / "c")

    def none(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(orbax_dir.np, "empty", none)
    fails(CorruptInput, lambda: reader.read("a"), "a: needs more memory")


def test_missing_tensorstore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What others wrote needs it; ours does not."""
    SAVE["v1"](tmp_path / "c", {"a": np.ones(4)})
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    assert is_orbax(tmp_path / "c")
    ours = {"a": np.ones((3, 4)), "b": np.float32(3)}
    assert_same(read_all(write(tmp_path / "d", ours)), ours)
    fails(MissingExtra, lambda: OrbaxReader(tmp_path / "c"), "zooconvert[orbax]")


def test_neither_jax_nor_orbax_is_needed(tmp_path: Path) -> None:
    """Nor more memory than a tensor's: 12 of 16 MiB grow the process by far less than 192."""
    script = f"""
import resource, sys
from pathlib import Path
import numpy as np
from zoo.containers.base import TensorInfo
from zoo.containers.orbax_dir import OrbaxReader, OrbaxWriter, is_orbax
assert "tensorstore" not in sys.modules
array = np.arange(4 << 20, dtype=np.float32).reshape(-1, 1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path = Path({str(tmp_path / "c")!r})
with OrbaxWriter(path, {{f"t{{i}}": TensorInfo("F32", array.shape) for i in range(12)}}, {{}}) as w:
    for i in range(12):
        w.write(f"t{{i}}", array)
    w.finish()
assert is_orbax(path)
reader = OrbaxReader(path)
for name in reader.tensors:
    assert (reader.read(name) == array).all()
assert not {{"jax", "jaxlib", "orbax", "flax", "torch"}} & set(sys.modules), sys.modules
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150 << 10


# What is not an Orbax checkpoint, or a hostile one.


def test_is_orbax_says_no(tmp_path: Path) -> None:
    assert not is_orbax(tmp_path / "absent")
    assert not is_orbax(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "10").mkdir()
    (tmp_path / "10" / "model.safetensors").write_bytes(b"x")
    assert not is_orbax(tmp_path)
    assert not is_orbax(tmp_path / "config.json")
    fails(CorruptInput, lambda: OrbaxReader(tmp_path), str(tmp_path), "no Orbax checkpoint")
    fails(CorruptInput, lambda: OrbaxReader(tmp_path / "config.json"), "not a directory")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """An Orbax checkpoint of plain files, easily tampered with."""
    SAVE["files"](tmp_path / "c", {"a": np.arange(4.0), "b": np.ones((2, 2), np.float32)})
    return tmp_path / "c"


@pytest.fixture
def zarr3(tmp_path: Path) -> Path:
    SAVE["files-zarr3"](tmp_path / "c3", {"a": np.arange(4.0), "b": np.ones(2)})
    return tmp_path / "c3"


@pytest.mark.parametrize("mode", ["files", "pytree", "v1"])
@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (["/etc"], "absolute"),
        (["..", "..", "x"], "leaves"),
        (["../../outside"], "leaves"),
        (["a/../../x"], "leaves"),
        (["a\0b"], "NUL"),
        ([""], "not a path"),
        (["\ud800"], "Unicode"),
    ],
)
def test_keys_that_leave(mode: str, keys: list[str], why: str, tmp_path: Path) -> None:
    SAVE[mode](tmp_path / "c", {"a": np.ones(2)})
    shutil.copytree(tmp_path / "c", tmp_path / "outside")
    tree = next((tmp_path / "c").rglob("_METADATA"))

    def change(meta: Any) -> None:
        entry = meta["tree_metadata"].pop("('a',)")
        entry["key_metadata"] = [{"key": key, "key_type": 2} for key in keys]
        meta["tree_metadata"]["culprit"] = entry

    edit(tree, change)
    fails(UnsafeInput, lambda: OrbaxReader(tmp_path / "c"), "culprit", why)


def test_links_that_leave(files: Path, tmp_path: Path) -> None:
    os.rename(files / "a", tmp_path / "elsewhere")
    (files / "a").symlink_to(tmp_path / "elsewhere")
    fails(UnsafeInput, lambda: OrbaxReader(files), f"{files}/a: is a link that leaves")
    (files / "a").unlink()
    os.rename(tmp_path / "elsewhere", files / "kept")
    (files / "a").symlink_to("kept")
    assert_same(read_all(files), {"a": np.arange(4.0), "b": np.ones((2, 2), np.float32)})
    (files / "b" / "0.0").unlink()
    (files / "b" / "0.0").symlink_to("/etc/hostname")
    fails(UnsafeInput, lambda: OrbaxReader(files), "b/0.0")
    (files / "b" / "0.0").unlink()
    (files / "b" / "0.0").symlink_to("0.0")
    fails(CorruptInput, lambda: OrbaxReader(files), "b/0.0")
    (files / "b" / "0.0").unlink()
    os.mkfifo(files / "b" / "0.0")
    fails(UnsafeInput, lambda: OrbaxReader(files), "b/0.0: is neither")


def test_a_step_that_is_a_link_out(files: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "1").symlink_to(files)
    fails(UnsafeInput, lambda: OrbaxReader(tmp_path / "run"), "run/1: is a link")
    (tmp_path / "direct").symlink_to(files)  # the user's own choice
    assert set(read_all(tmp_path / "direct")) == {"a", "b"}


ABSURD = [[1 << 40], [1 << 62, 1 << 62], [10**30], [-1], [2.0], ["4"], [True], 4, None]


@pytest.mark.parametrize("value", ABSURD)
@pytest.mark.parametrize("field", ["shape", "chunks"])
def test_absurd_shapes(field: str, value: Any, files: Path, zarr3: Path) -> None:
    edit(files / "a" / ".zarray", lambda m: m.update({field: value}))
    fails(CorruptInput, lambda: OrbaxReader(files), "a: ")

    def change(meta: Any) -> None:
        if field == "shape":
            meta["shape"] = value
        else:
            meta["chunk_grid"]["configuration"]["chunk_shape"] = value

    edit(zarr3 / "a" / "zarr.json", change)
    fails(CorruptInput, lambda: OrbaxReader(zarr3), "a: ")


def test_absurd_numbers_of_chunks(files: Path) -> None:
    edit(files / "a" / ".zarray", lambda m: m.update(shape=[1 << 22], chunks=[1]))
    fails(CorruptInput, lambda: OrbaxReader(files), "a: claims 4194304 chunks")


def test_absurd_shape_in_a_database(tmp_path: Path) -> None:
    SAVE["zarr3"](tmp_path / "c", {"a": np.arange(4.0), "b": np.ones(3)})
    kv = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/c/"}).result()
    meta = json.loads(kv.read("a/zarr.json").result().value)
    meta["shape"] = [1 << 45]
    kv.write("a/zarr.json", json.dumps(meta)).result()
    fails(CorruptInput, lambda: OrbaxReader(tmp_path / "c"), "a: claims 281474976710656 bytes")


def test_zeros_that_compress_well_are_believed(tmp_path: Path) -> None:
    """Orbax stores 96 MiB of zeros in 3 kB: the bound must lie above what zstd can do."""
    SAVE["files"](tmp_path / "c", {"mu": np.zeros(24 << 20, np.float32)})
    assert sum(p.stat().st_size for p in (tmp_path / "c" / "mu").iterdir()) < 5000
    assert not OrbaxReader(tmp_path / "c").read("mu").any()


def test_another_store_in_the_metadata_is_not_followed(files: Path, tmp_path: Path) -> None:
    other = {"driver": "file", "path": f"{tmp_path}/other/"}
    shutil.copytree(files / "a", tmp_path / "other")
    ts.open({"driver": "zarr", "kvstore": other}).result().write(np.full(4, 9.0)).result()
    edit(files / "a" / ".zarray", lambda m: m.update(kvstore=other, driver="zarr", path="../other"))
    edit(files / "_METADATA", lambda m: m.update(kvstore=other, base=other, path="../other"))
    arrays = {"a": np.arange(4.0), "b": np.ones((2, 2), np.float32)}
    error = attempt(files, arrays)
    assert error is None or f"{files}: a" in error


@pytest.mark.parametrize(
    "change",
    [
        {"compressor": {"id": "nonesuch"}},
        {"filters": [{"id": "nonesuch"}]},
        {"compressor": {"id": "zstd", "level": "high"}},
        {"compressor": None},
        {"order": "X"},
        {"zarr_format": 9},
    ],
)
def test_unknown_codecs_of_v2(change: Any, files: Path) -> None:
    edit(files / "a" / ".zarray", lambda m: m.update(change))
    reader = OrbaxReader(files)
    fails(CorruptInput, lambda: reader.read("a"), f"{files}: a: ")
    assert bits(reader.read("b")) == bits(np.ones((2, 2), np.float32))


@pytest.mark.parametrize(
    "codecs",
    [
        [{"name": "nonesuch"}],
        [],
        [{"name": "sharding_indexed", "configuration": {"chunk_shape": [3], "codecs": []}}],
        [{"name": "sharding_indexed", "configuration": {"chunk_shape": [1 << 40], "codecs": []}}],
    ],
)
def test_unknown_codecs_of_v3(codecs: Any, zarr3: Path) -> None:
    edit(zarr3 / "a" / "zarr.json", lambda m: m.update(codecs=codecs))
    fails(CorruptInput, lambda: OrbaxReader(zarr3).read("a"), f"{zarr3}: a: ")


def test_dtypes_that_are_not_carried(files: Path, tmp_path: Path) -> None:
    for dtype in ("int4", "<U4", [["x", "<f4"]], None):
        edit(files / "a" / ".zarray", lambda m, d=dtype: m.update(dtype=d))
        fails(CorruptInput, lambda: OrbaxReader(files), "a: has dtype")


def test_big_endian_and_columns(files: Path) -> None:
    """Zarr may store either byte order and either memory order; the values are what counts."""
    shutil.rmtree(files / "a")
    meta = {"shape": [2, 3], "chunks": [2, 2], "dtype": ">f4", "order": "F", "compressor": None}
    spec = {"driver": "zarr", "kvstore": f"file://{files}/a/", "metadata": meta, "create": True}
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    ts.open(spec).result().write(array).result()
    assert bits(OrbaxReader(files).read("a")) == bits(array)


@pytest.mark.parametrize("mode", ["files", "files-zarr3"])
def test_a_lost_chunk_is_an_error(mode: str, tmp_path: Path) -> None:
    SAVE[mode](tmp_path / "c", {"a": np.zeros(4), "b": np.ones(2)})
    chunk = next(p for p in ("a/0", "a/c/0") if (tmp_path / "c" / p).exists())
    (tmp_path / "c" / chunk).unlink()
    reader = OrbaxReader(tmp_path / "c")  # no tensor is read yet
    fails(CorruptInput, lambda: reader.read("a"), f"{tmp_path}/c: a: ", "missing")
    assert bits(reader.read("b")) == bits(np.ones(2))
    if mode == "files":
        # In a process of its own: a restore that fails leaves callbacks of a closed event loop
        # behind, whose complaints would surface in some later test.
        script = "import sys, orbax.checkpoint as o; o.PyTreeCheckpointer().restore(sys.argv[1])"
        args = [sys.executable, "-c", script, str(tmp_path / "c")]
        orbax = subprocess.run(args, capture_output=True, text=True)
        assert orbax.returncode == 1
        assert "is missing" in orbax.stderr
    # A release that left out chunks of zeros does not say that it stores them.
    edit(
        tmp_path / "c" / "_METADATA", lambda m: m.pop("store_array_data_equal_to_fill_value") and m
    )
    assert bits(read_all(tmp_path / "c")["a"]) == bits(np.zeros(4))
    assert bits(ocp.PyTreeCheckpointer().restore(tmp_path / "c")["a"]) == bits(np.zeros(4))


@pytest.mark.parametrize("mode", ["files", "files-zarr3"])
def test_a_chunk_that_expands(mode: str, tmp_path: Path) -> None:
    """64 KiB of zstd that unpack to 2 GiB, where 32 bytes are due."""
    SAVE[mode](tmp_path / "c", {"a": np.zeros(4)})
    if mode == "files-zarr3":  # not as a shard, whose index would be missed first
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"}]
        edit(tmp_path / "c" / "a" / "zarr.json", lambda m: m.update(codecs=codecs))
    chunk = next(p for p in ("a/0", "a/c/0") if (tmp_path / "c" / p).exists())
    block = (1 << 1 | 128 << 10 << 3).to_bytes(3, "little") + b"\0"  # 128 KiB of one byte
    last = (1 | 1 << 1 | 128 << 10 << 3).to_bytes(3, "little") + b"\0"
    frame = b"\x28\xb5\x2f\xfd\x00\x38" + block * (2 * 8192 - 1) + last
    (tmp_path / "c" / chunk).write_bytes(frame)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fails(CorruptInput, lambda: read_all(tmp_path / "c"), "a: ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize("mode", ["ours", "v1", "pytree"])
def test_truncated_data(mode: str, tmp_path: Path) -> None:
    """Each file with data cut short: an error, or nothing that mattered (old nodes)."""
    arrays = {"a": np.arange(2000.0), "b": np.ones(3000, np.float32)}
    (write if mode == "ours" else SAVE[mode])(tmp_path / "c", arrays)
    broken = 0
    data = [p for p in (tmp_path / "c").rglob("*") if p.is_file() and p.parent.name in "abd"]
    data += (tmp_path / "c").rglob("manifest.ocdbt")
    for path in data:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        error = attempt(tmp_path / "c", arrays)
        if error is not None:
            broken += 1
            assert error.count("\n") == 1
            assert str(tmp_path / "c") in error
        path.write_bytes(whole)
    assert broken >= (2 if mode == "ours" else 3)
    assert_same(read_all(tmp_path / "c"), arrays)


def test_a_damaged_index_is_an_error(tmp_path: Path) -> None:
    """OCDBT's nodes have checksums: no flipped bit in them may change a value silently."""
    SAVE["zarr3"](tmp_path / "c", {"a": np.arange(4.0)})  # small values lie in the nodes
    caught = 0
    for path in [*(tmp_path / "c" / "d").iterdir(), tmp_path / "c" / "manifest.ocdbt"]:
        whole = bytearray(path.read_bytes())
        for at in range(0, len(whole), 7):
            flipped = whole.copy()
            flipped[at] ^= 0x10
            path.write_bytes(flipped)
            caught += attempt(tmp_path / "c", {"a": np.arange(4.0)}) is not None
        path.write_bytes(whole)
    assert caught > 20


@pytest.mark.parametrize(
    ("remove", "word"),
    [
        ("manifest.ocdbt", "manifest.ocdbt is missing"),
        ("_METADATA", "_METADATA"),
        ("d", "state"),
    ],
)
def test_missing_parts(remove: str, word: str, tmp_path: Path) -> None:
    SAVE["v1"](tmp_path / "c", {"a": np.arange(2000.0)})
    target = tmp_path / "c" / "state" / remove
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert is_orbax(tmp_path / "c")
    if remove == "_METADATA":
        word = "no tree of arrays"
    fails(CorruptInput, lambda: read_all(tmp_path / "c"), str(tmp_path / "c"), word)


def test_missing_parts_of_a_flat_one(files: Path) -> None:
    (files / "b" / ".zarray").unlink()
    fails(CorruptInput, lambda: OrbaxReader(files), "b has no .zarray")
    (files / "_METADATA").unlink()
    assert is_orbax(files)
    fails(CorruptInput, lambda: OrbaxReader(files), str(files))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "\xff",
        "[" * 100_000,
        '{"tree_metadata": 3}',
        '{"tree_metadata": {}, "tree_metadata": {}}',
        '{"tree_metadata": {"x": 1}}',
        '{"tree_metadata": {"x": {"key_metadata": [1], "value_metadata": {"value_type": "s"}}}}',
        '{"tree_metadata": {"x": {"key_metadata": [{"key": 1}], "value_metadata":'
        ' {"value_type": "s"}}}}',
        '{"tree_metadata": {"x": {"key_metadata": [{"key": "q"}], "value_metadata":'
        ' {"value_type": "string"}}}}',
    ],
)
def test_malformed_trees(text: str, files: Path) -> None:
    (files / "_METADATA").write_text(text, encoding="latin-1")
    fails(CorruptInput, lambda: OrbaxReader(files), str(files))


def test_two_leaves_of_one_name(tmp_path: Path) -> None:
    SAVE["files"](tmp_path / "c", {"a.b": np.ones(2)})

    def change(meta: Any) -> None:
        entry = json.loads(json.dumps(meta["tree_metadata"]["('a.b',)"]))
        entry["key_metadata"] = [{"key": "a", "key_type": 2}, {"key": "b", "key_type": 2}]
        meta["tree_metadata"]["('a', 'b')"] = entry

    edit(tmp_path / "c" / "_METADATA", change)
    fails(CorruptInput, lambda: OrbaxReader(tmp_path / "c"), "a.b stands twice")


def test_an_array_that_claims_to_be_a_number(files: Path) -> None:
    edit(
        files / "_METADATA",
        lambda m: m["tree_metadata"]["('a',)"]["value_metadata"].update(value_type="scalar"),
    )
    fails(CorruptInput, lambda: OrbaxReader(files), "a is no single number")


def test_uncommitted(tmp_path: Path) -> None:
    SAVE["v1"](tmp_path / "c", {"a": np.ones(2)})
    whole = tmp_path / "c"
    (whole / "commit_success.txt").unlink()
    assert_same(read_all(whole), {"a": np.ones(2)})  # as releases before 0.12 left it
    edit(whole / "_CHECKPOINT_METADATA", lambda m: m.update(commit_timestamp_nsecs=None))
    fails(CorruptInput, lambda: OrbaxReader(whole), str(whole), "is incomplete", "commit time")
    (whole / "_CHECKPOINT_METADATA").write_text("{")
    fails(CorruptInput, lambda: OrbaxReader(whole), "_CHECKPOINT_METADATA cannot be read")
    (whole / "_CHECKPOINT_METADATA").write_text('{"init_timestamp_nsecs": 1}')
    (whole / "commit_success.txt").touch()
    assert_same(read_all(whole), {"a": np.ones(2)})
    os.rename(whole / "state", whole / "state.orbax-checkpoint-tmp-1")
    fails(CorruptInput, lambda: OrbaxReader(whole), "state.orbax-checkpoint-tmp-1")
    os.rename(whole / "state.orbax-checkpoint-tmp-1", whole / "state")
    (whole / "_CHECKPOINT_DELETION").write_text("{}")
    fails(CorruptInput, lambda: OrbaxReader(whole), "being deleted")
    (whole / "_CHECKPOINT_DELETION").unlink()
    temporary = tmp_path / "c.orbax-checkpoint-tmp"
    os.rename(whole, temporary)
    assert is_orbax(temporary)
    fails(CorruptInput, lambda: OrbaxReader(temporary), "temporary name")
