"""KV-cache sparsity while the model runs: ``check``, ``check_prompts`` and ``apply`` work on a stack of the family's
methods."""

from sparsebench.methods.kv_cache.acting import apply, check, check_prompts

__all__ = ["apply", "check", "check_prompts"]
