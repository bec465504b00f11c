"""Attaching to a model and computing its attention: exact, over the pairs that the methods allow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from sparsebench.errors import UserError
from sparsebench.models import caching
from sparsebench.models.plug.cache import PositionCache
from sparsebench.models.plug.call import Allowed, Call, Handler, Rotary, Work, left_out

NAME = "sparsebench"
# Logits computed in one piece, more queries come in several: pieces that stay in the cache are more than twice as fast
# on a CPU, and the keys behind a piece's last query need not be touched.
_PAIRS_AT_ONCE = 2**22
# What attention functions are told by models whose attention is more than scaled dot products.
_FOREIGN = ("softcap", "s_aux", "sinks", "position_bias", "sliding_window")


@dataclass
class Plug:
    """What is attached to one model: its attention modules and the handlers at work."""

    modules: list[nn.Module]
    rotary: nn.Module | None
    handlers: list[Handler] = field(default_factory=list)
    seen: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)  # the arguments of the call in progress

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before an attention module runs: notes what the attention function is not told."""
        self.seen[module] = {**kwargs, **({"hidden_states": args[0]} if args else {})}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, slots: Tensor, scaling: float
    ) -> Any:
        """The attention module's output (B, T, H, D), under the handlers."""
        told = self.seen.pop(module)
        given = caching.cache_given(told)
        cache = given if isinstance(given, PositionCache) else None
        if given is not None and cache is None:
            raise UserError(f"model: its cache of class {type(given).__name__} is out of the methods' reach")
        call = Call(
            int(module.layer_idx),  # type: ignore[arg-type]
            module, query, key, value, told["hidden_states"],
            None if left_out(module) else told.get("position_embeddings"),
            told.get("position_ids"), _as_bool(slots), scaling, cache, self.rotate_at,
        )  # fmt: skip
        if cache is not None and module is self.modules[0] and call.position_ids is not None:
            cache.remember(call.position_ids, call.past)
        return compute(call, self.handlers)

    def rotate_at(self, position_ids: Tensor) -> Rotary | None:
        """cos and sin at these rotary positions (rows, tokens), by the model's own rotary module; None without one."""
        if self.rotary is None:
            return None
        parameter = next(self.modules[0].parameters())
        like = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        cos, sin = self.rotary(like, position_ids=position_ids)
        return cos, sin


_PLUGS: WeakKeyDictionary[nn.Module, Plug] = WeakKeyDictionary()  # by model
_PLUG_OF: WeakKeyDictionary[nn.Module, Plug] = WeakKeyDictionary()  # by attention module
_PROBE: ContextVar[list[nn.Module] | None] = ContextVar("probe", default=None)


@contextmanager
def plugged(model: PreTrainedModel, handler: Handler) -> Iterator[None]:
    """Inside, ``handler`` acts in every attention layer of ``model``; outside the model is as it was. Contexts nest:
    the handlers then act together. UserError as from ``reach``."""
    plug = _PLUGS.get(model)
    if plug is not None:
        plug.handlers.append(handler)
        try:
            yield
        finally:
            plug.handlers.remove(handler)
        return
    modules = reach(model)
    rotary = next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)
    plug = Plug(modules, rotary, [handler])
    with ExitStack() as stack:
        stack.enter_context(_implementation(model))
        for module in modules:
            _PLUG_OF[module] = plug
            stack.callback(_PLUG_OF.pop, module)
            stack.callback(module.register_forward_pre_hook(plug.hook, with_kwargs=True).remove)
        stack.callback(model.register_forward_pre_hook(_give_cache, with_kwargs=True).remove)
        _PLUGS[model] = plug
        stack.callback(_PLUGS.pop, model)
        yield


def positions_of(model: nn.Module) -> int | None:
    """How many positions the model was made for; None where its config does not say."""
    found: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    return found


def reach(model: PreTrainedModel) -> list[nn.Module]:
    """The model's attention modules, in the order of its layers, found by running two tokens through it.

    UserError when its attention goes another way than transformers' attention interface, sees a window, or is more
    than scaled dot products.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise UserError(f"model: {name} has layers of {', '.join(sorted(kinds))}, which attention methods cannot reach")
    found: list[nn.Module] = []
    token = _PROBE.set(found)
    try:
        with _implementation(model), torch.no_grad():
            device = next(model.get_input_embeddings().parameters()).device
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    except UserError:
        raise
    except Exception as error:  # custom code may fail in any way: what it says is passed on
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model: the attention of {name} is out of the methods' reach ({reason})") from None
    finally:
        _PROBE.reset(token)
    layers = [getattr(module, "layer_idx", None) for module in found]
    if layers != list(range(config.num_hidden_layers)):
        raise UserError(
            f"model: {name} runs {len(found)} of its {config.num_hidden_layers} attention layers through transformers' "
            "attention interface, so methods cannot reach them all"
        )
    return found


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **told: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls. ``dropout``, which is 0 in evaluation, by place as well: kvpress
    wraps all attention functions there are and calls them so."""
    scaling = told.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    probe = _PROBE.get()
    if probe is not None:
        _check_call(module, query, attention_mask, told)
        probe.append(module)
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None
    plug = _PLUG_OF.get(module)
    if plug is None or attention_mask is None:
        raise ValueError(f"{type(module).__name__} was called as if methods were attached to it, but none are")
    return plug.attend(module, query, key, value, attention_mask, scaling), None


def _mask(batch_size: int, q_length: int, kv_length: int, **told: Any) -> Tensor:
    """The mask function that goes with it: (B, 1, T, L) bool over true positions, never left out. Queries that are
    padding see nothing."""
    told |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor = sdpa_mask(batch_size, q_length, kv_length, **told)  # type: ignore[assignment]
    real = told.get("attention_mask")
    if real is not None:
        mask = mask & real[:, kv_length - q_length : kv_length].bool()[:, None, :, None]
    return mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def _check_call(module: nn.Module, query: Tensor, mask: Tensor | None, told: dict[str, Any]) -> None:
    name = type(module).__name__
    foreign = [word for word in _FOREIGN if told.get(word) is not None]
    if foreign or not getattr(module, "is_causal", True):
        raise UserError(f"model: {name} computes more than causal attention ({', '.join(foreign) or 'not causal'})")
    if mask is None or mask.dim() != 4 or mask.shape[-2:] != (query.shape[2], query.shape[2]):
        raise UserError(f"model: {name} makes its own masks, so methods cannot reach its attention")


@contextmanager
def _implementation(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the decoder calls our attention function."""
    configs = {
        id(config): config for module in model.get_decoder().modules() if (config := getattr(module, "config", None))
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _give_cache(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the model runs: a cache that knows positions, where transformers would make or has just made its own."""
    given = caching.cache_given(kwargs)
    wanted = kwargs.get("use_cache")
    wanted = getattr(model.config, "use_cache", False) if wanted is None else wanted
    fresh = given is None and wanted
    if fresh or (type(given) is DynamicCache and given.get_seq_length() == 0):
        return args, {**caching.without_cache(kwargs), caching.cache_name(model): PositionCache()}
    return None


def _as_bool(mask: Tensor) -> Tensor:
    """A mask that was given in four dimensions may be additive."""
    return mask if mask.dtype == torch.bool else mask >= 0


def compute(call: Call, handlers: list[Handler]) -> Tensor:
    """Exact attention over the pairs that are visible and allowed by every handler: (B, T, H, D). A query that is left
    with no key gives zeros."""
    for handler in handlers:
        handler.before(call)
    allowed = [handler.allow(call) for handler in handlers]
    batch, heads, tokens = call.query.shape[:3]
    weigh = any(handler.wants_weights for handler in handlers)
    dense = call.slots.sum(dim=(1, 2, 3))
    made = allowed[0].by_kernel(call) if len(handlers) == 1 and not weigh and allowed[0] is not None else None
    if made is not None:
        handlers[0].after(call, Work(made[1], dense))
        return made[0].transpose(1, 2).contiguous()
    counts = [torch.zeros(batch, heads, dtype=torch.long, device=call.query.device) for _ in handlers]
    key, value = (x.repeat_interleave(call.groups, dim=1) if call.groups > 1 else x for x in (call.key, call.value))
    size = max(1, _PAIRS_AT_ONCE // max(1, batch * heads * key.shape[2]))
    outputs, weights = [], []
    attend = _weighed if weigh else _fused
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        behind = call.past + stop if call.in_order else key.shape[2]
        mask, bias = _joined(call, allowed, counts, start, stop, behind)
        query = call.query[:, :, start:stop]
        output, weight = attend(query, key[:, :, :behind], value[:, :, :behind], mask, bias, call.scaling)
        outputs.append(torch.where(mask.any(dim=-1, keepdim=True), output, 0))
        if weight is not None:
            weights.append(F.pad(weight, (0, key.shape[2] - behind)))
    if weigh:
        call.weights = torch.cat(weights, dim=2)
    for handler, count in zip(handlers, counts, strict=True):
        handler.after(call, Work(count, dense))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _joined(
    call: Call, allowed: list[Allowed | None], counts: list[Tensor], start: int, stop: int, behind: int
) -> tuple[Tensor, Tensor | None]:
    """The mask (B, 1 or H, rows, columns up to ``behind``) and the bias of some queries; adds each handler's pairs to
    ``counts``."""
    visible = call.visible(start, stop)[..., :behind]
    if visible.shape[1] not in (1, call.query.shape[1]):
        visible = visible.repeat_interleave(call.groups, dim=1)
    mask, bias = visible, None
    for one, count in zip(allowed, counts, strict=True):
        if one is None:
            count += _pairs(visible)
            continue
        kept = visible & one.rows(start, stop)[..., :behind]
        count += _pairs(kept)
        mask = kept if mask is visible else mask & kept
        extra = one.bias_rows(start, stop)
        if extra is not None:
            bias = extra[..., :behind] if bias is None else bias + extra[..., :behind]
    return mask, bias


def _pairs(mask: Tensor) -> Tensor:
    return mask.sum(dim=-1, dtype=torch.int32).sum(dim=-1)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor | None, scaling: float
) -> tuple[Tensor, None]:
    given = mask if bias is None else torch.where(mask, bias, -torch.inf).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=given, scale=scaling), None


def _weighed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    logits = (query @ key.transpose(-1, -2)).float() * scaling
    logits = (logits if bias is None else logits + bias).masked_fill(~mask, -torch.inf)
    weights = logits.softmax(dim=-1).nan_to_num(0.0)
    return weights.to(query.dtype) @ value, weights
