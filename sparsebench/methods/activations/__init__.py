"""Activation sparsity while the model runs: ``check`` and ``apply`` work on a stack of the family's methods."""

from sparsebench.methods.activations.base import apply, check

__all__ = ["apply", "check"]
