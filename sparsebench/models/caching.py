"""What a model's forward takes: its own name for its cache (``cache``, in older model code ``past_key_values``), and
whether it can give the last logits alone. Looked up once for each class of models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

_NAMES = ("cache", "past_key_values")


def cache_name(model: nn.Module) -> str:
    """The argument of the model's forward that is its cache, and the field of its output."""
    return next((name for name in _NAMES if name in _arguments(type(model).forward)), _NAMES[-1])


def last_only(model: nn.Module) -> dict[str, Any]:
    """The argument that asks for the logits of the last token alone; nothing where the model cannot."""
    return {"logits_to_keep": 1} if "logits_to_keep" in _arguments(type(model).forward) else {}


def cache_given(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a call, whatever its name; None if there is none."""
    return next((arguments[name] for name in _NAMES if arguments.get(name) is not None), None)


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The other ones."""
    return {name: value for name, value in arguments.items() if name not in _NAMES}


def read(model: nn.Module, ids: Tensor, behind: Any = None, **others: Any) -> tuple[Tensor, Any]:
    """A forward of ids (rows, tokens) behind a cache, or none: logits (rows, tokens, vocabulary), and the cache that
    has these tokens, too. ``others``: further arguments of the model."""
    name = cache_name(model)
    given = {} if behind is None else {name: behind}
    output = model(input_ids=ids, use_cache=True, **given, **others)
    return output.logits, getattr(output, name)


@cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
