"""What libraries leave when they are killed while they write over a checkpoint of theirs."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torture_case import in_child

SHAPE = (4, 1024, 1024)  # 16 MB of float32
_OLD, _NEW, _LOST = 10, 11, 12
Save = Callable[[Path, np.ndarray], None]
Load = Callable[[Path], np.ndarray]


def _save_torch(path: Path, array: np.ndarray) -> None:
    import torch

    torch.save({"w": torch.from_numpy(array)}, path)


def _load_torch(path: Path) -> np.ndarray:
    import torch

    return np.asarray(torch.load(path)["w"].numpy())


def _save_safetensors(path: Path, array: np.ndarray) -> None:
    from safetensors.numpy import save_file

    save_file({"w": array}, path)


def _load_safetensors(path: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    return np.asarray(load_file(path)["w"])


def _save_orbax(path: Path, array: np.ndarray) -> None:
    import orbax.checkpoint as ocp

    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(path, {"w": array}, force=True)
    checkpointer.wait_until_finished()


def _load_orbax(path: Path) -> np.ndarray:
    import orbax.checkpoint as ocp

    return np.asarray(ocp.PyTreeCheckpointer().restore(path)["w"])


def _killed(save: Save, load: Load, module: str) -> Callable[..., Counter[str]]:
    def look(path: Path) -> None:
        try:
            found = load(path)
        except Exception:
            os._exit(_LOST)
        same = [found.shape == SHAPE and bool((found == x).all()) for x in (1, 2)]
        os._exit(_OLD if same[0] else _NEW if same[1] else _LOST)

    def kills(folder: Path, times: int, rng: random.Random) -> Counter[str]:
        __import__(module)  # once, and not in every child
        folder.mkdir(parents=True)
        path, kept = folder / "checkpoint", folder / "kept"
        old, new = (np.full(SHAPE, x, np.float32) for x in (1, 2))
        assert in_child(lambda: save(kept, old)) == 0
        started = time.monotonic()
        assert in_child(lambda: save(path, new)) == 0
        took = time.monotonic() - started
        found: Counter[str] = Counter()
        for _ in range(times):
            for left in folder.glob("checkpoint*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            (shutil.copytree if kept.is_dir() else shutil.copy)(kept, path)
            pid = os.fork()
            if pid == 0:
                save(path, new)
                os._exit(0)
            time.sleep(rng.random() * 1.2 * took)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            found[{_OLD: "old", _NEW: "new"}.get(in_child(lambda: look(path)), "lost")] += 1
        return found

    return kills


LIBRARIES = {
    "torch.save": _killed(_save_torch, _load_torch, "torch"),
    "safetensors' save_file": _killed(_save_safetensors, _load_safetensors, "safetensors.numpy"),
    "Orbax's save with force": _killed(_save_orbax, _load_orbax, "orbax.checkpoint"),
}
