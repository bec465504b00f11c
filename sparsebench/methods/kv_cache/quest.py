"""Quest: query-aware pages of the cache (Tang et al. 2024, arXiv 2406.10774).

    page p keeps kmin, kmax = channel-wise min and max of its keys (rotated)
    ub(h, p) = sum_d max(q_hd kmin_pd, q_hd kmax_pd) >= max over the page of q_h . k

Everything is stored; a decoded token reads the best pages exactly. Default rule (Sparse Frontier, arXiv 2504.17768,
4.6): ``budget // page_size`` of the complete earlier pages, and always the page that the token stands in (so up to a
page more than the budget), per query head, or per KV head by the sum over its query heads (``share_pages=group``).
``reference=true`` is the released rule: max(min_pages, budget // page_size) of all pages, none forced, the partial
page scored by the keys it holds. The first ``dense_layers`` layers read all. Achieved sparsity counts the entries that
query heads do not read in the other layers, over the prompt's tokens; ``kv_read`` also counts what page scores read (a
page's two vectors are one entry) and, per KV head, the union of its query heads' pages; ``kv_stored`` the pages'
vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsebench.costs.flops import Attention
from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.kv_cache.base import Selector
from sparsebench.methods.kv_cache.entries import Entries, top
from sparsebench.models.plug import Work


@method(
    name="quest",
    version=1,
    paper="Tang et al. 2024, arXiv 2406.10774",
    target="kv_cache",
    phase="decode",
    baseline="streaming_llm",
    taxonomy=Taxonomy(
        object="kv_cache",
        granularity=("page",),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        benefit_realised_on=("flops",),
        kernel_required="paged attention",
    ),
)
@dataclass(frozen=True)
class Quest(Selector):
    """Each decoded token reads the pages whose keys could match its query best."""

    page_size: int = option(16, "entries of a page, a power of two", low=1, unit="tokens")
    dense_layers: int = option(2, "first layers that read everything", low=0)
    min_pages: int = option(3, "pages that are read at least", low=1)
    share_pages: str = option("none", "one list of pages for the query heads of a KV head", choices=("none", "group"))
    force_current_page: bool = option(True, "always read the page of the token itself")
    reference: bool = option(False, "the released rule: no page is forced")

    @property
    def forces(self) -> bool:
        """Whether the current page is always read."""
        return self.force_current_page and not self.reference

    def check_model(self, model: PreTrainedModel) -> None:
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        if self.dense_layers >= layers:
            raise UserError(f"{self.name('dense_layers')}: the model has {layers} layers, none would be sparse")
        if self.page_size & (self.page_size - 1):
            raise UserError(f"{self.name('page_size')}: must be a power of two")

    def select(self, now: Entries, count: Tensor) -> Tensor | None:
        if now.call.index < self.dense_layers:
            return None
        pages = self.pages(now, count)
        page = now.rank // self.page_size
        page = now.repeated(page) if pages.shape[1] != page.shape[1] else page
        return pages.gather(3, page[:, :, None].expand(-1, -1, pages.shape[2], -1).clamp(max=pages.shape[3] - 1))

    def pages(self, now: Entries, count: Tensor) -> Tensor:
        """(B, H or K, T, pages) bool: what each query reads of budgets ``count`` (B,)."""
        scores = self.scores(now)
        places = torch.arange(scores.shape[-1], device=scores.device)
        own = (now.seen - 1).clamp(min=0) // self.page_size  # the page each query stands in
        own = own if scores.shape[1] == own.shape[1] else now.repeated(own)
        wanted = (count // self.page_size)[:, None, None]
        if self.forces:
            best = top(scores, wanted.clamp(min=self.min_pages - 1).expand(own.shape), places < own[..., None])
            return best | (places == own[..., None])
        return top(scores, wanted.clamp(min=self.min_pages).expand(own.shape), places <= own[..., None])

    def scores(self, now: Entries) -> Tensor:
        """ub (B, H, T, pages), summed over the group (B, K, T, pages) for shared pages; of a query's own page, over the
        keys up to it."""
        paged, held = self.paged(now)
        low = paged.masked_fill(~held, torch.inf).cummin(dim=3).values
        high = paged.masked_fill(~held, -torch.inf).cummax(dim=3).values
        query = now.call.query.float()
        bound = _bound(
            query, *(now.repeated(part[:, :, :, -1].nan_to_num(posinf=0.0, neginf=0.0)) for part in (low, high))
        )
        where = (now.seen - 1).clamp(min=0)
        page, place = where // self.page_size, where % self.page_size
        rows = torch.arange(len(where))[:, None, None], torch.arange(where.shape[1])[:, None]
        own = [
            now.repeated(part[rows[0], rows[1], page, place].nan_to_num(posinf=0.0, neginf=0.0)) for part in (low, high)
        ]
        exact = torch.maximum(query * own[0], query * own[1]).sum(dim=-1, keepdim=True)
        bound = bound.scatter(3, now.repeated(page)[..., None], exact)
        return now.grouped(bound).sum(dim=2) if self.share_pages == "group" else bound

    def paged(self, now: Entries) -> tuple[Tensor, Tensor]:
        """Keys by page (B, K, pages, page_size, D), and which of the places hold one (B, K, pages, page_size, 1)."""
        most = int(now.lengths.max())
        pages = -(-most // self.page_size)
        columns = (~now.valid).long().argsort(dim=-1, stable=True)[..., :most]
        keys = now.call.key.float().gather(2, columns[..., None].expand(-1, -1, -1, now.call.key.shape[-1]))
        held = torch.arange(most, device=keys.device) < now.lengths[..., None]
        more = pages * self.page_size - most
        keys = torch.nn.functional.pad(keys, (0, 0, 0, more)).unflatten(2, (pages, self.page_size))
        return keys, torch.nn.functional.pad(held, (0, more)).unflatten(2, (pages, self.page_size))[..., None]

    def tally(self, now: Entries, work: Work) -> tuple[float, float]:
        return (0.0, 0.0) if now.call.index < self.dense_layers else super().tally(now, work)

    def stored(self, now: Entries) -> Tensor:
        return now.seen + self._vectors(now)

    def index_read(self, now: Entries) -> Tensor:
        return self._vectors(now)

    def _vectors(self, now: Entries) -> Tensor:
        """(B, K, T): pages at each query; the two vectors of one are as large as an entry."""
        if now.call.index < self.dense_layers or self.asked == 0:
            return torch.zeros_like(now.seen)
        return -(-now.seen // self.page_size)

    def choosing(self, layers: int) -> range:
        return range(self.dense_layers, layers)

    def index_decode(self, layer: Attention, length: int) -> float:
        return 4.0 * layer.heads * layer.head_dim * length / self.page_size

    def tolerance(self, shortest: int, model: PreTrainedModel) -> float:
        return (self.page_size + 1) / max(1, shortest)


def _bound(query: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """sum_d max(q_d low_d, q_d high_d): query (B, H, T, D), low <= high (B, H, pages, D) -> (B, H, T, pages)."""
    return query.clamp(min=0) @ high.transpose(-1, -2) + query.clamp(max=0) @ low.transpose(-1, -2)
