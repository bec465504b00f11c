"""A small model that learns what a large one attends to, by imitating its outputs (for ``specontext``).

The student is one decoder layer on the teacher's own embeddings, with the teacher's attention shape: queries and keys
are projections of what the teacher's first attention layer sees (normed embeddings), rotated alike. All but its query
and key projections is thrown away after training, so those two matrices are the retrieval head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sparsebench.costs.flops import Attention
from sparsebench.models.plug import Call, Handler, Work, plugged

Rotary = tuple[Tensor, Tensor]
TOKENS = 256  # of a training sequence
ROWS = 8  # sequences of a step


def rotated(x: Tensor, rotary: Rotary | None) -> Tensor:
    """x (B, heads, T, D) under cos and sin (B or 1, T, rotated channels), halves of a head turned against each
    other."""
    if rotary is None:
        return x
    cos, sin = (part[:, None].to(x.dtype) for part in rotary)
    width = cos.shape[-1]
    part, rest = x[..., :width], x[..., width:]
    low, high = part.chunk(2, dim=-1)
    return torch.cat([part * cos + torch.cat([-high, low], dim=-1) * sin, rest], dim=-1)


def projected(hidden: Tensor, weight: Tensor, size: int, rotary: Rotary | None) -> Tensor:
    """(B, T, hidden) -> (B, heads, T, size), rotated."""
    return rotated((hidden.to(weight.dtype) @ weight.T).unflatten(-1, (-1, size)).transpose(1, 2), rotary)


@dataclass
class Teacher(Handler):
    """Notes what the first attention layer sees, and the attention averaged over layers and heads where asked."""

    attention: bool = False
    hidden: Tensor | None = None
    rotary: Rotary | None = None
    paid: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wants_weights = self.attention

    def before(self, call: Call) -> None:
        if call.index == 0:
            self.hidden, self.rotary, self.paid = call.hidden, call.rotary, []

    def after(self, call: Call, work: Work) -> None:
        if call.weights is not None:
            self.paid.append(call.weights.mean(dim=1))


class Student(nn.Module):
    """The one-layer model."""

    def __init__(self, width: int, shape: Attention, head: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape

        def matrix(out: int, inner: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(out, inner, generator=generator) * inner**-0.5)

        self.query, self.key = (matrix(n * shape.head_dim, width) for n in (shape.heads, shape.kv_heads))
        self.value, self.output = (
            matrix(shape.kv_heads * shape.head_dim, width),
            matrix(width, shape.heads * shape.head_dim),
        )
        self.up, self.gate, self.down = matrix(2 * width, width), matrix(2 * width, width), matrix(width, 2 * width)
        self.norms = nn.Parameter(torch.ones(2, width))
        self.head = nn.Parameter(head.float().cpu().clone())

    def attention(self, hidden: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values (B, heads, T, D), keys and values repeated for the query heads."""
        size, groups = self.shape.head_dim, self.shape.heads // self.shape.kv_heads
        query, key = (projected(hidden, weight, size, rotary) for weight in (self.query, self.key))
        value = projected(hidden, self.value, size, None)
        return query, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)

    def forward(self, embedded: Tensor, hidden: Tensor, rotary: Rotary | None) -> Tensor:
        """Logits (B, T, vocabulary) from embeddings and normed embeddings (B, T, width)."""
        mixed = F.scaled_dot_product_attention(*self.attention(hidden, rotary), is_causal=True)
        x = embedded + mixed.transpose(1, 2).flatten(2) @ self.output.T
        inner = F.rms_norm(x, x.shape[-1:], self.norms[0])
        x = x + (F.silu(inner @ self.gate.T) * (inner @ self.up.T)) @ self.down.T
        return F.rms_norm(x, x.shape[-1:], self.norms[1]) @ self.head.T


def distilled(
    model: PreTrainedModel,
    shape: Attention,
    windows: Tensor,
    *,
    steps: int,
    rate: float,
    seed: int,
    of_attention: bool,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, Tensor], float]:
    """Query (heads * D, width) and key (KV heads * D, width) projections of the student after ``steps`` of AdamW, and
    its last loss: KL to the teacher's next-token distribution, or (``of_attention``) of its mean attention.

    windows: (sequences, tokens) int64; the teacher is left as it is."""
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings().weight
    if not isinstance(head, Tensor):
        raise ValueError("the teacher has no language-model head")
    device = head.device
    student = Student(head.shape[1], shape, head.detach(), generator).to(device)
    optimiser = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
    teacher, loss = Teacher(of_attention), torch.zeros(())
    for step in range(steps):
        rows = torch.randint(len(windows), (ROWS,), generator=generator)
        start = int(torch.randint(max(1, windows.shape[1] - TOKENS + 1), (1,), generator=generator))
        ids = windows[rows, start : start + TOKENS].to(device)
        with torch.no_grad(), plugged(model, teacher):
            output = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        if teacher.hidden is None:
            raise ValueError("the teacher's attention did not run")
        hidden, embedded = teacher.hidden.float(), output.hidden_states[0].float()
        with torch.enable_grad():
            loss = _attention_loss(student, teacher, hidden) if of_attention else F.kl_div(
                student(embedded, hidden, teacher.rotary).log_softmax(-1).flatten(0, 1),
                output.logits.float().log_softmax(-1).flatten(0, 1), log_target=True, reduction="batchmean",
            )  # fmt: skip
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        progress(step + 1, steps)
    return {"query": student.query.detach(), "key": student.key.detach()}, float(loss.detach())


def _attention_loss(student: Student, teacher: Teacher, hidden: Tensor) -> Tensor:
    """KL(mean attention of the teacher || mean attention of the student's heads), per query."""
    query, key, _ = student.attention(hidden, teacher.rotary)
    tokens = query.shape[2]
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    logits = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    paid = logits.softmax(dim=-1).mean(dim=1).clamp(min=1e-9)
    target = torch.stack(teacher.paid).mean(dim=0)
    return F.kl_div(paid.log().flatten(0, 1), target.flatten(0, 1), reduction="batchmean")
