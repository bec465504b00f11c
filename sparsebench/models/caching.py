"""A model's own name for its cache: ``cache``, in older model code ``past_key_values``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

_NAMES = ("cache", "past_key_values")


def cache_name(model: nn.Module) -> str:
    """The argument of the model's forward that is its cache, and the field of its output."""
    return _named(type(model).forward)


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
def _named(forward: Callable[..., Any]) -> str:
    return _NAMES[0] if _NAMES[0] in inspect.signature(forward).parameters else _NAMES[1]
