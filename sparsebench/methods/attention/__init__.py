"""Sparse attention in prefill: ``check`` and ``apply`` work on a stack of the family's methods."""

from sparsebench.methods.attention.base import apply, check, check_prompts

__all__ = ["apply", "check", "check_prompts"]
