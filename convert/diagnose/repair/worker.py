"""The search in a process of its own: a fused kernel with edited sizes may end it.

The parent sends a pickled Problem and gets a pickled Answer; the number of the candidate that is
being tried stands in a file, so that a second process can leave out one that ended the first.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from convert.diagnose.repair.search import BUSY, Answer, Problem, search

_STARTS = 3  # processes at most
_STARTING = 20.0  # seconds that a process may take to start, beside its search
_OVER = 10  # seconds of computing that the last candidate of a search may take beyond its budget


class Worker:
    """A process that waits for a problem; started early, as it takes a second or two."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="zooconvert")
        self.at = Path(self.folder.name) / "at"
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.at.unlink(missing_ok=True)
        path = os.pathsep.join(p for p in sys.path if p)
        return subprocess.Popen(
            [sys.executable, "-m", "convert.diagnose.repair.worker", str(self.at)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def solve(self, problem: Problem) -> Answer:
        """The answer; an empty one where every process died of a candidate."""
        end = time.monotonic() + BUSY * problem.seconds
        for _ in range(_STARTS):
            left = max(1.0, end - time.monotonic())
            seconds = min(problem.seconds, left)
            try:
                data, _ = self.process.communicate(
                    pickle.dumps(replace(problem, seconds=seconds)),
                    timeout=left + BUSY * _STARTING,
                )
            except subprocess.TimeoutExpired:
                return Answer(finished=False)
            if self.process.returncode == 0:
                return pickle.loads(data)  # type: ignore[no-any-return]
            number = int(self.at.read_text() or -1) if self.at.exists() else -1
            if number < 0 or time.monotonic() > end:
                break
            problem = replace(problem, skip=problem.skip | {number})
            self.process = self._start()
        return Answer(finished=False)

    def close(self) -> None:
        """End the process and remove its folder."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.folder.cleanup()


def main() -> None:
    """Read a problem from stdin, write its answer to stdout."""
    import torch

    torch.set_num_threads(1)
    problem: Problem = pickle.load(sys.stdin.buffer)
    _limit(int(time.process_time() + problem.seconds) + _OVER)
    with open(sys.argv[1], "wb", buffering=0) as file:

        def note(number: int) -> None:
            os.pwrite(file.fileno(), b"%-12d" % number, 0)

        answer = search(problem, note)
    sys.stdout.buffer.write(pickle.dumps(answer))


def _limit(seconds: int) -> None:
    """End this process once it has computed so long: one candidate may never come back."""
    with contextlib.suppress(ImportError):  # not every system has it
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


if __name__ == "__main__":
    main()
