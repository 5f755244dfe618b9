"""Which container a conversion writes, where, and what it puts beside it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from zoo.checkpoint.label import Label
from zoo.checkpoint.plan import Plan
from zoo.containers import filenames
from zoo.containers.base import TensorInfo, Writer
from zoo.containers.errors import MissingExtra, UsageError

TO = tuple(filenames.SUFFIXES)


@dataclass(frozen=True)
class Target:
    """Where a conversion goes. `is_directory`: the checkpoint is one, with its files inside."""

    path: Path
    to: str
    is_directory: bool
    max_shard_size: int | None = None

    @property
    def has_config(self) -> bool:
        """Whether a config.json is written, and not only what is in the file itself."""
        return self.is_directory or self.to in ("msgpack", "pt")

    def beside(self, name: str) -> str:
        """Where a file that belongs to the checkpoint goes, relative to the target's parent."""
        return f"{self.path.name}/{name}" if self.is_directory else f"{self.path.name}.{name}"


def choose(
    source: Path, dst: Path | None, to: str | None, framework: str, max_shard_size: int | None
) -> Target:
    """The target for what the user asked.

    Without `to`, the suffix of `dst` decides, else orbax for flax and safetensors for torch.
    Without `dst`, the target lies beside the source.
    """
    if max_shard_size is not None and max_shard_size <= 0:
        raise UsageError(f"a shard of {max_shard_size} bytes", "give a size such as 5GB")
    if dst is not None and dst.name in ("", ".."):
        dst = dst.resolve()
    if to is not None and by_suffix(dst) not in (None, to):
        raise UsageError(f"{dst} has the suffix of {by_suffix(dst)}, and to is {to}", "change one")
    if to is None:
        to = by_suffix(dst) or ("orbax" if framework == "flax" else "safetensors")
    if to not in TO:
        raise UsageError(f"there is no container {to!r}", f"known are {', '.join(TO)}")
    if framework == "torch" and to in ("orbax", "msgpack"):
        raise UsageError(f"{to} is not a container of PyTorch's", "it is safetensors or pt")
    if framework == "flax" and to == "pt":
        raise UsageError("pt is not a container of Flax's", "it is orbax, msgpack or safetensors")
    if max_shard_size is not None and to != "safetensors":
        raise UsageError("only safetensors is written in shards", "add --to safetensors")
    if to == "pt" and importlib.util.find_spec("torch") is None:
        raise MissingExtra("writing a .pt file", "torch")
    if dst is None:
        dst = _default(source, to, framework, max_shard_size is not None)
    directory = (
        to == "orbax"
        or max_shard_size is not None
        or dst.is_dir()
        or (to == "safetensors" and dst.suffix == "")
    )
    if directory and to in ("msgpack", "pt"):
        dst, directory = dst / f"{source.stem}{filenames.SUFFIXES[to]}", False
    return Target(dst, to, directory, max_shard_size)


def open_writer(
    target: Target, place: Path, plan: Plan, label: Label, resumed: bool = False
) -> Writer:
    """The Writer for `target`, at work in the directory `place`; `resumed`: where another began."""
    path = place / target.path.name
    header = plan.target_tensors()
    ties = written_ties(target, plan)
    if target.to == "safetensors":
        header |= {name: header[to] for name, to in ties.items()}
        metadata = {"format": "pt" if plan.target_side == "torch" else "flax"} | label.to_metadata()
        return _safetensors(target, path, header, metadata, resumed)
    if target.to == "orbax":
        from zoo.containers.orbax_dir import OrbaxWriter

        return OrbaxWriter(path, header, label.to_metadata(), resumed)
    if target.to == "msgpack":
        from zoo.containers.flax_msgpack import MsgpackWriter

        return MsgpackWriter(path, header, {}, resumed)
    from zoo.containers.torch_file import TorchWriter

    return TorchWriter(path, header, {}, ties)


def written_ties(target: Target, plan: Plan) -> dict[str, str]:
    """Second names that are written too: all in a .pt file, where they share the storage; in
    safetensors, which would hold them twice, only those that the source spelled out."""
    if target.to == "pt":
        return dict(plan.ties)
    return {name: to for name, to in plan.ties.items() if name in plan.spelled}


def _safetensors(
    target: Target,
    path: Path,
    header: dict[str, TensorInfo],
    metadata: dict[str, str],
    resumed: bool,
) -> Writer:
    if target.is_directory:
        from zoo.containers.sharded import ShardedSafetensorsWriter

        size = target.max_shard_size or 1 << 62
        return ShardedSafetensorsWriter(path, header, metadata, size, resumed)
    from zoo.containers.safetensors_file import SafetensorsWriter

    return SafetensorsWriter(path, header, metadata, resumed)


def by_suffix(dst: Path | None) -> str | None:
    """The container that a target's name asks for, if it does."""
    suffix = dst.suffix if dst else ""
    if suffix in (".pth", ".bin"):
        return "pt"
    return next((to for to, s in filenames.SUFFIXES.items() if s and s == suffix), None)


def _default(source: Path, to: str, framework: str, sharded: bool) -> Path:
    if source.name in ("", ".."):
        source = source.resolve()
    if source.is_dir() or not source.exists():
        stem = source.name.removesuffix(".flax")
    else:
        stem = Path(source.name.removesuffix(filenames.INDEX)).stem
    if framework == "flax":
        name = f"{stem}.flax" + ("" if to == "orbax" or sharded else filenames.SUFFIXES[to])
    else:
        name = stem.removesuffix(".flax") + ("" if sharded else filenames.SUFFIXES[to])
    return source.with_name(name)
