"""The first place at which two modules part, and why."""

from convert.diagnose.find import first_divergence
from convert.diagnose.weights import diagnose_tensor
from convert.matching.layers import match_layers
from convert.matching.parameters import match_parameters

__all__ = ["diagnose_tensor", "first_divergence", "match_layers", "match_parameters"]
