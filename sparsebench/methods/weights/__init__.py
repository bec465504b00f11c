"""Weight sparsity after training: ``check`` and ``apply`` work on a stack of the family's methods."""

from sparsebench.methods.weights.walk import apply, check

__all__ = ["apply", "check"]
