"""An ONNX file, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from zoo.containers.errors import MissingExtra, UsageError, printable

_DTYPES = {
    **{"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16},
    **{"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_},
    **{"tensor(int8)": np.int8, "tensor(uint8)": np.uint8, "tensor(int16)": np.int16},
}


class OnnxSession:
    """One file, ready to run on the CPU. Raises UsageError for what onnxruntime refuses."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtra("running an ONNX file", "onnx") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised; the rest is not for our users
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as e:
            raise _refused(path, e) from None
        self.path = path
        # Sizes by name; None where a size is free.
        self.inputs: dict[str, tuple[int | None, ...]] = {
            x.name: tuple(n if isinstance(n, int) else None for n in x.shape)
            for x in self._session.get_inputs()
        }
        self._dtypes = {x.name: _DTYPES.get(x.type) for x in self._session.get_inputs()}
        self.outputs = [x.name for x in self._session.get_outputs()]
        kinds = {x.type for x in self._session.get_outputs()}
        self.precision = "float16" if "tensor(float16)" in kinds else "float32"

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name, in the file's order. Inputs are cast to the dtypes that it takes;
        those that it does not have are left out."""
        given = {
            n: np.asarray(inputs[n], self._dtypes[n] or inputs[n].dtype, order="C")
            for n in self.inputs
            if n in inputs
        }
        try:
            made = self._session.run(None, given)
        except Exception as e:
            raise _refused(self.path, e) from None
        return dict(zip(self.outputs, map(np.asarray, made), strict=True))


def _refused(path: Path, e: Exception) -> UsageError:
    why = " ".join(str(e).split())
    return UsageError(
        f"onnxruntime cannot run {path.name}: {printable(why[:500])}",
        "see that its opset and dtypes are ones that onnxruntime has: float32 mostly is, bfloat16 "
        "mostly is not; what is not run (--no-verify) can be written",
    )
