"""Arrays by name that stay in their file until one is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from zoo.containers.base import Reader, TensorInfo
from zoo.containers.dtypes import code_of
from zoo.layout.ops import Ops, run, run_shapes

Read = Callable[[], np.ndarray]


class Lazy(Mapping[str, np.ndarray]):
    """Names -> arrays, each read anew whenever it is asked for; `infos` is known without reading.

    Valid for as long as the readers behind it are open.
    """

    def __init__(self) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._read: dict[str, Read] = {}

    def add(self, name: str, info: TensorInfo, read: Read) -> None:
        """One more array."""
        self.infos[name] = info
        self._read[name] = read

    def add_tensor(self, name: str, reader: Reader, stored: str) -> None:
        """One more: the tensor that `reader` calls `stored`."""
        self.add(name, reader.tensors[stored], lambda: reader.read(stored))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos


def info_of(arrays: Mapping[str, np.ndarray], name: str) -> TensorInfo:
    """Dtype and shape of one of the arrays; not read, where that can be told without."""
    if isinstance(arrays, Lazy):
        return arrays.infos[name]
    array = np.asarray(arrays[name])
    return TensorInfo(code_of(array.dtype), array.shape)


def moved(
    ops: Ops, infos: list[TensorInfo], reads: list[Read], which: int
) -> tuple[TensorInfo, Read]:
    """Result number `which` of the ops on the arrays: what it is, and how to read it."""
    shape = run_shapes(ops, [i.shape for i in infos])[which]
    return TensorInfo(infos[0].dtype, shape), lambda: run(ops, [read() for read in reads])[which]


def loaded(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All of them, read."""
    return {name: np.asarray(arrays[name], order="C") for name in arrays}
