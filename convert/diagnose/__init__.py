"""The first place at which two modules part, and why."""

from convert.diagnose.find import first_divergence
from convert.diagnose.hypotheses_tensors import diagnose_tensor

__all__ = ["diagnose_tensor", "first_divergence"]
