"""Expected Attention: what future queries will attend to (Devoto et al. 2025, arXiv 2510.00636), as in kvpress.

    q = the prompt's queries before the rotary embedding, without the first n_sink;  mu, Sigma = their mean, covariance
    R = mean of the rotary matrices of the next n_future positions;   mu <- R mu,  Sigma <- R Sigma R^T
    z_j = mu . k_j / sqrt(D) + k_j^T Sigma k_j / (2 D);   p = softmax_j z, mean over the KV head's query heads
    score_j = (p_j + epsilon) * ||v_j||_2;   the first n_sink entries always stay

Needs neither the question nor attention weights. Dropped once, at the end of the prompt, on which queries and keys of
padding do not count; decoded tokens stay. ``head_allocation=ada`` shares a layer's budget among its heads (kvpress'
registered form, with epsilon 0.01). R is one averaged matrix, not the average of R Sigma R^T, as in the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsebench.costs.flops import Attention
from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.kv_cache.base import Evictor
from sparsebench.methods.kv_cache.entries import Entries, oldest, shared_among_heads
from sparsebench.methods.kv_cache.rotary import needs_rotary


@method(
    name="expected_attention",
    version=1,
    paper="Devoto et al. 2025, arXiv 2510.00636",
    target="kv_cache",
    phase="prefill+decode",
    baseline="random_kv",
    taxonomy=Taxonomy(
        object="kv_cache",
        granularity=("token",),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        benefit_realised_on=("memory", "flops"),
        kernel_required="ragged attention",
    ),
)
@dataclass(frozen=True)
class ExpectedAttention(Evictor):
    """Keeps the entries that future queries, guessed as Gaussian, would attend to most."""

    n_future: int = option(512, "positions over which the rotary embedding is averaged", low=1, unit="tokens")
    n_sink: int = option(4, "first entries, which always stay and are left out of the statistics", low=0, unit="tokens")
    use_covariance: bool = option(True, "the quadratic term")
    use_vnorm: bool = option(True, "multiply by the norm of the value")
    epsilon: float = option(0.0, "added to the expected attention", low=0.0)
    head_allocation: str = option(
        "uniform", "the same budget for every head, or shared among them", choices=("uniform", "ada")
    )
    alpha_safeguard: float = option(
        0.2, "share of its budget that a head keeps", low=0.0, high=1.0, only="head_allocation=ada"
    )

    def forced(self, kept: int) -> int:
        return self.n_sink + 1

    def check_model(self, model: PreTrainedModel) -> None:
        needs_rotary(model, f"method={self.declared['name']}")

    def check_prompt(self, tokens: int) -> None:
        if tokens <= self.n_sink:
            raise UserError(f"{self.name('n_sink')}: the prompt has only {tokens} tokens")
        super().check_prompt(tokens)

    def score(self, now: Entries) -> Tensor:
        call = now.call
        first = now.rank[:, :1] < self.n_sink
        counted = (now.valid[:, :1] & ~first).float()  # (B, 1, T): the queries that count
        mean, spread = statistics(call.unrotated()[0].float(), counted)
        mean, spread = self.rotated(now, mean, spread)
        sinks = oldest(now.valid, self.n_sink)
        p = expected(mean, spread if self.use_covariance else None, now.keys, now.repeated(now.valid & ~sinks))
        scores = now.grouped(p).mean(dim=2) + self.epsilon
        if self.use_vnorm:
            scores = scores * call.value.float().norm(dim=-1)
        return scores.masked_fill(sinks, torch.inf)

    def rotated(self, now: Entries, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, H, D) and covariance (B, H, D, D) under the averaged rotary matrix of the next positions."""
        batch = len(mean)
        last = now.call.key_position_ids[:, 0, -1:]
        tables = now.call.rotate_at(last + 1 + torch.arange(self.n_future, device=last.device))
        if tables is None:
            raise ValueError("the model has no rotary embedding")
        cos, sin = (part.float().mean(dim=1).expand(batch, -1) for part in tables)
        turn = averaged_rotation(cos, sin, mean.shape[-1])[:, None]
        return (turn @ mean[..., None])[..., 0], turn @ spread @ turn.transpose(-1, -2)

    def choose(self, now: Entries, count: Tensor) -> Tensor:
        if self.head_allocation == "uniform":
            return super().choose(now, count)
        room = torch.minimum(count, now.prompt)
        floor = torch.maximum((room.double() * self.alpha_safeguard).long(), room.clamp(max=self.n_sink))
        return shared_among_heads(self.score(now), room, floor, now.valid)

    def index_prefill(self, layer: Attention, length: int) -> float:
        quadratic = 2 if self.use_covariance else 0  # the covariance and the quadratic form
        return 2.0 * layer.heads * layer.head_dim * length * (1 + quadratic * layer.head_dim)


def statistics(queries: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, H, D) and population covariance (B, H, D, D) of queries (B, H, T, D) where ``counted`` (B, 1, T) is
    1."""
    total = counted.sum(dim=-1)[..., None]
    weight = counted[..., None]
    mean = (queries * weight).sum(dim=2) / total
    centred = (queries - mean[:, :, None]) * weight
    return mean, centred.transpose(-1, -2) @ centred / total[..., None]


def averaged_rotation(cos: Tensor, sin: Tensor, size: int) -> Tensor:
    """diag(cos) + diag(sin) P with P x = rotate_half(x), identity on channels that are not rotated: cos, sin (B, R) ->
    (B, D, D)."""
    width = cos.shape[-1]
    eye = torch.eye(width, device=cos.device)
    low, high = eye.chunk(2, dim=0)
    half = torch.cat([-high, low], dim=0)
    turn = torch.eye(size, device=cos.device).repeat(len(cos), 1, 1)
    turn[:, :width, :width] = cos[..., None] * eye + sin[..., None] * half
    return turn


def expected(mean: Tensor, spread: Tensor | None, keys: Tensor, among: Tensor) -> Tensor:
    """Expected attention p (B, H, S) on keys (B, H, S, D) ``among`` (B, H, S) of queries with this mean (B, H, D) and
    covariance (B, H, D, D)."""
    size = keys.shape[-1]
    z: Tensor = (keys @ mean[..., None])[..., 0] / size**0.5
    if spread is not None:
        z = z + ((keys @ spread) * keys).sum(dim=-1) / (2 * size)
    return z.masked_fill(~among, -torch.inf).softmax(dim=-1)
