"""WINA's transform: rotated residual streams that make the columns of k and gate orthogonal, function unchanged.

With Q_a(l), Q_m(l) the right singular vectors (all of them) of block l's k and gate, RMSNorm gains folded into
what reads them, and hidden states as rows:

    E <- E Q_a(0);  q, k, v <- W Q_a(l);  o <- Q_m(l)^T W;  gate, up <- W Q_m(l);  down <- Q_a(l+1)^T W
    h = r (Q_a(l)^T Q_m(l)) + attention(norm(r));  h = h (Q_m(l)^T Q_a(l+1)) + mlp(norm(h))

The last block keeps Q_m, which the head undoes. RMSNorm without gain commutes with rotations, so logits stay equal
up to rounding. ``center_embeddings``: the release first subtracts from every embedding its mean, which is exact for
LayerNorm models only. Needs a second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsebench.errors import UserError
from sparsebench.methods.activations.sites import GatedBlock, gated_blocks

_NORMS = ("input_layernorm", "post_attention_layernorm")


def check_rotatable(model: Any, blocks: list[GatedBlock]) -> None:
    """UserError unless the blocks are RMSNorm, attention, add, RMSNorm, gated MLP, add."""
    norms = [getattr(model.get_decoder(), "norm", None)]
    for block in blocks:
        named = {name: module for name, module in block.module.named_children() if "norm" in name}
        if (
            sorted(named) != sorted(_NORMS)
            or not hasattr(block.module, "self_attn")
            or not hasattr(block.module, "mlp")
        ):
            raise _unfit(model, f"{block.name} is not normalised once before attention and once before the MLP")
        norms += [named[name] for name in _NORMS]
    if not all(norm is not None and _commutes(norm) for norm in norms):
        raise _unfit(model, "a norm is not RMSNorm times its gain, which rotations would not commute with")


def _unfit(model: nn.Module, why: str) -> UserError:
    return UserError(
        f"method.wina.transform=true: {type(model).__name__}: {why}; valid for Llama, Mistral, Qwen; or transform=false"
    )


def _commutes(norm: nn.Module) -> bool:
    """Whether norm(x) is gain * n(x) with n(x Q) = n(x) Q: not so with a mean taken off, or a gain of 1 + weight."""
    gain = getattr(norm, "weight", None)
    if gain is None or [name for name, _ in norm.named_parameters()] != ["weight"]:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, len(gain), generator=generator).to(gain)
    q = torch.linalg.qr(torch.randn(len(gain), len(gain), generator=generator)).Q.to(gain)
    plain = {"weight": torch.ones_like(gain)}
    bare = torch.func.functional_call(norm, plain, (x,))
    turned = torch.func.functional_call(norm, plain, (x @ q,))
    within = 1e-3 if gain.dtype == torch.float32 else 0.05
    pairs = ((turned, bare @ q), (norm(x), gain * bare))
    return all(torch.allclose(one, other, rtol=within, atol=within) for one, other in pairs)


def right_vectors(weight: Tensor) -> Tensor:
    """All right singular vectors of a weight (out, in), as the columns of an (in, in) float64 matrix."""
    vectors: Tensor = torch.linalg.svd(weight.double(), full_matrices=True).Vh
    return vectors.T.contiguous()


class Rotation:
    """The transform of one model. Inside ``applied()`` the model has the rotated weights, outside its own."""

    @torch.no_grad()
    def __init__(self, model: Any, center_embeddings: bool) -> None:
        self.model = model
        self.blocks = gated_blocks(model)
        self.swaps: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.shortcuts: list[tuple[Tensor, Tensor | None]] = []
        self._rotate(center_embeddings)

    def _put(self, module: nn.Module, name: str, value: Tensor) -> None:
        old = getattr(module, name)
        self.swaps.append((module, name, nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=False)))

    def _rotate(self, center_embeddings: bool) -> None:
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        table = embedding.weight.double()
        if center_embeddings:
            table = table - table.mean(dim=1, keepdim=True)
        turns = [self._block_turns(block) for block in self.blocks]
        self._put(embedding, "weight", table @ turns[0][0])
        for index, (block, (q_a, q_m)) in enumerate(zip(self.blocks, turns, strict=True)):
            after = turns[index + 1][0] if index + 1 < len(turns) else q_m
            for kinds, name, turn in ((("q", "k", "v"), _NORMS[0], q_a), (("gate", "up"), _NORMS[1], q_m)):
                norm = block.module.get_submodule(name)
                gain = norm.get_parameter("weight").double()
                for kind in kinds:
                    linear = block.linears[kind].module
                    self._put(linear, "weight", linear.weight.double() * gain @ turn)
                self._put(norm, "weight", torch.ones_like(gain))
            for kind, turn in (("o", q_m), ("down", after)):
                linear = block.linears[kind].module
                self._put(linear, "weight", turn.T @ linear.weight.double())
                if linear.bias is not None:
                    self._put(linear, "bias", turn.T @ linear.bias.double())
            one = torch.eye(len(q_a), dtype=torch.float64, device=q_a.device)
            last = None if after is q_m else (q_m.T @ after - one).to(embedding.weight.dtype)
            self.shortcuts.append(((q_a.T @ q_m - one).to(embedding.weight.dtype), last))
        norm = self.model.get_decoder().norm
        self._put(head, "weight", head.weight.double() * norm.weight.double() @ turns[-1][1])
        self._put(norm, "weight", torch.ones_like(norm.weight))

    @staticmethod
    def _block_turns(block: GatedBlock) -> tuple[Tensor, Tensor]:
        """(Q_a, Q_m) of a block: right singular vectors of k and gate with the gains in front of them folded in."""
        found = []
        for kind, name in (("k", _NORMS[0]), ("gate", _NORMS[1])):
            gain = block.module.get_parameter(f"{name}.weight")
            found.append(right_vectors(block.linears[kind].module.weight.double() * gain.double()))
        return found[0], found[1]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model is rotated inside."""
        own = [(module, name, getattr(module, name)) for module, name, _ in self.swaps]
        handles: list[Any] = []
        try:
            for module, name, value in self.swaps:
                setattr(module, name, value)
            for block, (attention, mlp) in zip(self.blocks, self.shortcuts, strict=True):
                handles += _turned(block.module, block.module.get_submodule("self_attn"), attention)
                if mlp is not None:
                    norm = block.module.get_submodule(_NORMS[1])
                    handles += _turned(norm, block.module.get_submodule("mlp"), mlp)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, name, value in own:
                setattr(module, name, value)


def _turned(source: nn.Module, branch: nn.Module, turn: Tensor) -> list[Any]:
    """Hooks that add ``r turn`` to what ``branch`` puts out, r being the input of ``source``: since the block adds
    r itself, the residual stream is multiplied by 1 + turn."""
    seen: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[:] = [args[0] if args else kwargs["hidden_states"]]

    def behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        extra = seen.pop() @ turn
        return (output[0] + extra, *output[1:]) if isinstance(output, tuple) else output + extra

    return [source.register_forward_pre_hook(before, with_kwargs=True), branch.register_forward_hook(behind)]
