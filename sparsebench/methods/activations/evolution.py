"""Evolutionary search of a vector in [0, 1]^n, as R-Sparse describes it; its release has no search.

Not given by the paper and chosen here: elitism 4, uniform crossover with probability 0.5 per entry between parents
drawn from the better half, mutation by N(0, 0.1) with probability 0.1 per entry, clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ELITE = 4
_MUTATED, _SPREAD = 0.1, 0.1


def search(
    fitness: Callable[[Tensor], float],
    first: list[Tensor],
    *,
    population: int,
    generations: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[Tensor, float]:
    """The vector (n,) float64 with the lowest fitness found, and that fitness.

    ``first``: vectors that are in the first generation, the rest is drawn uniformly. The best ones survive, so the
    result is never worse than any of them."""
    draws = torch.Generator().manual_seed(seed)
    size = len(first[0])
    drawn = [torch.rand(size, generator=draws, dtype=torch.float64) for _ in range(population - len(first))]
    scored: list[tuple[float, Tensor]] = []
    fresh = [*first, *drawn][:population]
    for generation in range(generations):
        for index, one in enumerate(fresh):
            scored.append((fitness(one), one))
            progress(generation * population + index + 1, generations * population)
        scored = sorted(scored, key=lambda pair: pair[0])[:population]
        if generation + 1 < generations:
            elite = min(_ELITE, len(scored))
            parents = [one for _, one in scored[: max(2, population // 2)]]
            fresh = [_child(parents, draws) for _ in range(population - elite)]
            scored = scored[:elite]
    return scored[0][1], scored[0][0]


def search_in_groups(
    fitness: Callable[[Tensor], float],
    first: list[Tensor],
    groups: list[Tensor],
    *,
    population: int,
    generations: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[Tensor, float]:
    """As ``search``, over one group of entries (their indices, int64) after another while the others stay at the best
    vector so far, which is the best of ``first`` at the start."""
    value, best = min(((fitness(one), one) for one in first), key=lambda pair: pair[0])
    each = population * generations
    for number, group in enumerate(groups):
        held = _Held(fitness, best, group)
        part, value = search(
            held, [best[group], *(one[group] for one in first)], population=population, generations=generations,
            seed=seed + number, progress=_behind(number * each, len(groups) * each, progress),
        )  # fmt: skip
        best = held.whole(part)
    return best, value


@dataclass(frozen=True)
class _Held:
    """The fitness of one group's entries while all others stay."""

    fitness: Callable[[Tensor], float]
    others: Tensor
    group: Tensor

    def whole(self, part: Tensor) -> Tensor:
        return self.others.index_copy(0, self.group, part)

    def __call__(self, part: Tensor) -> float:
        return self.fitness(self.whole(part))


def _behind(before: int, total: int, progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
    return lambda done, of: progress(before + done, total)


def _child(parents: list[Tensor], draws: torch.Generator) -> Tensor:
    mother, father = (parents[int(torch.randint(len(parents), (), generator=draws))] for _ in range(2))
    coin = torch.rand(len(mother), generator=draws) < 0.5
    child = torch.where(coin, mother, father)
    mutated = torch.rand(len(child), generator=draws) < _MUTATED
    noise = torch.randn(len(child), generator=draws, dtype=torch.float64) * _SPREAD
    return torch.where(mutated, child + noise, child).clamp(0, 1)
