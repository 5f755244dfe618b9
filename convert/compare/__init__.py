"""Proof that two things are the same: bits of weights, outputs judged by the rounding noise."""
