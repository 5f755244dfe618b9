"""Optimizer states between PyTorch and optax, through one canonical form."""
