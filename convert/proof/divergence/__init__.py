"""The first place at which two modules part, and why."""

from convert.proof.divergence.find import first_divergence
from convert.proof.divergence.pairing import match_layers
from convert.proof.divergence.parameters import match_parameters
from convert.proof.divergence.tensors import diagnose_tensor

__all__ = ["diagnose_tensor", "first_divergence", "match_layers", "match_parameters"]
