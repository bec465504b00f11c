"""Does a claim hold? *reproduced*, *not reproduced*, *inconclusive* or *untested*, with the numbers behind it.

Every claim is tested for and against. Its effect ``theta`` is signed in the claimed direction: left - right (right
- left for < and <=), plus the margin for >= and <=, minus the margin for > and <, so that theta > 0 is what is
claimed. ``p_for`` is the p of theta <= 0, ``p_against`` that of theta >= 0; both are corrected over the paper's claims
of the same kind (Holm), and below .025 they decide. A paper's printed numbers never enter.

``for_each`` makes components. ``all`` holds when every one does (its p_for is the largest, its p_against the smallest
times their number), ``any`` is the mirror image, ``mean`` averages theta, ``at_least: k`` takes the k-th smallest
p_for times their number. What is not smooth (min, max, knee) is tested by the bootstrap, with one seed or with at
least eight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import isfinite, isnan

import numpy

from sparsebench.analysis.claims import Claim
from sparsebench.analysis.expressions import Number, Value
from sparsebench.analysis.measures import Bench, Evidence, Values
from sparsebench.analysis.outcomes import Untested
from sparsebench.analysis.statistics import ALPHA, POWER, Array, Effect, Weights, bootstrap, holm, jackknife

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE, UNTESTED = "reproduced", "not reproduced", "inconclusive", "untested"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE, UNTESTED)
_BOOTSTRAP_SEEDS = 8  # the fewest, other than one, from which the bootstrap decides
_KNEE_RESAMPLES = 1000  # a knee is searched for in each
_FIT_RESAMPLES = 100  # a law is fitted in each
_STRICT = (">", "<")


@dataclass(frozen=True)
class Part:
    """One component's test. ``low``, ``high``: its 95% interval; ``boot_low``, ``boot_high``: that of the paired
    bootstrap, for figures; ``needed``: about how many samples would decide at this effect, None if no number would.
    """

    values: dict[str, Value]
    theta: float
    low: float
    high: float
    p_for: float
    p_against: float
    mde: float
    df: float
    samples: int
    seeds: int
    needed: int | None = None
    boot_low: float | None = None
    boot_high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """What is concluded of one claim, and why. Numbers are those of the component that decides, named in ``at``;
    None where untested. ``estimate`` is theta. ``mde``: the effect that could have been detected."""

    claim: Claim = field(repr=False)
    verdict: str = UNTESTED
    why: str = ""
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    p_for: float | None = None
    p_against: float | None = None
    p_for_adjusted: float | None = None
    p_against_adjusted: float | None = None
    mde: float | None = None
    needed: int | None = None
    df: float | None = None
    samples: int | None = None
    seeds: int | None = None
    scope: str = ""
    at: dict[str, Value] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether it enters the headline: a main claim that is expected to hold for small models."""
        return self.claim.kind == "main" and self.claim.tiny_scale == "yes"


def judge(claims: Sequence[tuple[Claim, Evidence]]) -> list[Verdict]:
    """The verdicts, in order, with p values corrected over each paper's ``main`` and ``secondary`` claims."""
    tested = [test(claim, evidence) for claim, evidence in claims]
    families: dict[tuple[str, str], list[int]] = {}
    for at, verdict in enumerate(tested):
        if verdict.p_for is not None and verdict.claim.kind != "sanity":
            families.setdefault((verdict.claim.paper, verdict.claim.kind), []).append(at)
    for members in families.values():
        pro = holm([tested[at].p_for or 0.0 for at in members])
        contra = holm([tested[at].p_against or 0.0 for at in members])
        for at, p_for, p_against in zip(members, pro, contra, strict=True):
            tested[at] = replace(tested[at], p_for_adjusted=p_for, p_against_adjusted=p_against)
    return [_decided(verdict, len(families.get((verdict.claim.paper, verdict.claim.kind), ()))) for verdict in tested]


def test(claim: Claim, evidence: Evidence) -> Verdict:
    """The claim by itself: its numbers, not yet corrected and (unless untested or exact) without a verdict."""
    evidence = evidence.of(claim)
    try:
        components = claim.components(evidence.points)
        if not components:
            hint = evidence.nearest(claim.select_of(claim.record_calls[0]))
            raise Untested(f"no record: no planned run gives {', '.join(claim.for_each)} a value{hint}")
        if claim.at_least is not None and claim.at_least > len(components):
            raise Untested(f"at_least {claim.at_least} of only {len(components)} components")
        if claim.unit == "none":
            return _exact(claim, evidence, components)
        if claim.monotone:
            return _monotone(claim, evidence, components)
        if claim.quantifier == "mean":
            return _combined(claim, [_tested(claim, Bench(claim, evidence, components), {})])
        return _combined(claim, [_tested(claim, Bench(claim, evidence, [one]), one) for one in components])
    except Untested as reason:
        return Verdict(claim, UNTESTED, str(reason))


def _tested(claim: Claim, bench: Bench, values: Values) -> Part:
    """One component, or the mean of all of the bench's."""
    if claim.relation != "~":
        return _one(claim, bench, values, _theta(claim, bench, 1 if claim.relation.endswith("=") else -1))
    plain = _one(claim, bench, values, _theta(claim, bench, 0))
    # Inside [-margin, margin]: above the one bound and below the other; outside: beyond either.
    above, below = (_one(claim, bench, values, _theta(claim, bench, sign)) for sign in (1, -1))
    p_inside = max(above.p_for, below.p_against)
    p_outside = min(above.p_against, below.p_for)
    return replace(plain, p_for=p_inside, p_against=p_outside, needed=None)


def _theta(claim: Claim, bench: Bench, margin_sign: int) -> Effect:
    """theta as a function of weights, averaged over the bench's components."""
    flip = -1 if claim.relation.startswith("<") else 1
    right_side = claim.right or Number(0.0)

    def effect(weights: Weights) -> Array:
        thetas = []
        for at in range(len(bench.leaves)):
            left, right = bench.value(at, claim.left, weights), bench.value(at, right_side, weights)
            margin = claim.margin * (numpy.abs(right) if claim.margin_relative else 1.0)
            thetas.append(flip * (left - right) + margin_sign * margin)
        return _mean(thetas)

    return effect


def _one(claim: Claim, bench: Bench, values: Values, effect: Effect) -> Part:
    seeds, populations, unit = len(bench.seeds), bench.populations, claim.unit
    if not isfinite(float(effect(Weights.ones(seeds, populations))[0])):
        raise Untested(f"{_at(values)}the expression has no value (a division by 0, a log of 0, or no knee)")
    smooth = claim.left.smooth and (claim.right is None or claim.right.smooth)
    resamples = _FIT_RESAMPLES if claim.references else 10_000 if smooth or not _has_knee(claim) else _KNEE_RESAMPLES
    drawn = bootstrap(effect, seeds, populations, unit=unit, resamples=resamples)
    if len(drawn.thetas) < resamples / 2:
        raise Untested(f"{_at(values)}the expression has no value in {drawn.failed} of {resamples} resamples")
    boot = drawn.interval()
    if smooth:
        found = jackknife(effect, seeds, populations, unit=unit, bounded=bench.bounded)
        if isnan(found.se):
            raise Untested(f"{_at(values)}the expression has no value, or only one sample is left, in part of the data")
        ps = found.p_at_most(strict=claim.relation in _STRICT), found.p_at_least(strict=True)
        numbers = (found.theta, *found.interval(), *ps, found.mde, found.df, found.samples, seeds)
        return Part(dict(values), *numbers, needed=found.samples_needed(), boot_low=boot[0], boot_high=boot[1])
    theta = float(effect(Weights.ones(seeds, populations))[0])
    decides = seeds == 1 or seeds >= _BOOTSTRAP_SEEDS
    ps = (drawn.p_at_most(), drawn.p_at_least()) if decides else (1.0, 1.0)
    notes = [] if decides else [f"what is not smooth needs 1 or at least {_BOOTSTRAP_SEEDS} seeds, not {seeds}"]
    notes += [f"{drawn.failed} of {resamples} resamples have no value"] if drawn.failed else []
    mde = (1.96 + POWER) * float(drawn.thetas.std())
    samples = sum(one.size for one in populations)
    numbers = (theta, *boot, *ps, mde, float("inf"), samples, seeds)
    return Part(dict(values), *numbers, boot_low=boot[0], boot_high=boot[1], note="; ".join(notes))


def _has_knee(claim: Claim) -> bool:
    return any(call.kind.startswith("knee.") for call in claim.record_calls)


def _combined(claim: Claim, parts: Sequence[Part]) -> Verdict:
    """The quantifier over components: p values of the whole, and the component whose numbers are shown."""
    count = len(parts)
    pro, contra = sorted(parts, key=lambda x: x.p_for), sorted(parts, key=lambda x: x.p_against)
    k = {"all": count, "any": 1, "mean": 1}.get(claim.quantifier, claim.at_least or 1)
    # Intersection-union: that all hold needs no correction; whatever picks among components does.
    p_for = pro[k - 1].p_for * (1 if k == count else count)
    p_against = contra[count - k].p_against * (1 if k == 1 else count)
    deciding = contra[count - k] if contra[count - k].p_against < pro[k - 1].p_for else pro[k - 1]
    return _verdict(claim, parts, deciding, min(1.0, p_for), min(1.0, p_against))


def _monotone(claim: Claim, evidence: Evidence, components: Sequence[Values]) -> Verdict:
    """No neighbours significantly in the wrong order, and the last against the first in the right one."""
    key = claim.for_each[0]
    if len(components) < 2 or any(isinstance(one[key], (str, bool)) for one in components):
        raise Untested(f"{claim.relation} needs at least two numbers along {key}")
    flip = 1 if claim.relation == "monotone_up" else -1

    def step(first: Values, last: Values) -> Part:
        bench = Bench(claim, evidence, [first, last])
        rise: Callable[[Weights], Array] = lambda weights: (  # noqa: E731
            flip * (bench.value(1, claim.left, weights) - bench.value(0, claim.left, weights))
        )
        return _one(claim, bench, {key: f"{first[key]} to {last[key]}"}, rise)

    steps = [step(a, b) for a, b in pairwise(components)]
    whole = step(components[0], components[-1]) if len(components) > 2 else steps[0]
    worst = min(steps, key=lambda one: one.p_against)
    p_against = min(1.0, worst.p_against * len(steps))
    parts = steps if len(components) == 2 else [*steps, whole]
    return _verdict(claim, parts, worst if p_against < ALPHA else whole, whole.p_for, p_against)


def _exact(claim: Claim, evidence: Evidence, components: Sequence[Values]) -> Verdict:
    """Numbers without noise: compared as they are, in every seed."""
    bench = Bench(claim, evidence, components)
    each_seed = Weights(numpy.eye(len(bench.seeds)), ())
    groups = [[float(x) for x in one] for one in _exact_thetas(claim, bench, each_seed)]
    if any(not isfinite(one) for group in groups for one in group):
        raise Untested("the expression has no value (a division by 0 or a log of 0)")
    holds = [all(_holds(claim.relation, one) for one in group) for group in groups]
    needed = {"all": len(holds), "any": 1, "mean": 1}.get(claim.quantifier, claim.at_least or 1)
    good = sum(holds) >= needed
    theta, at = min((min(group), index) for index, group in enumerate(groups))
    place = dict(components[at]) if len(groups) == len(components) else {}
    why = f"exact{_at(place, ' at ')}: {'' if good else 'not '}as claimed, {theta:.6g} in the claimed direction"
    verdict = REPRODUCED if good else NOT_REPRODUCED
    scope = _scope(len(bench.seeds))
    return Verdict(claim, verdict, why, theta, theta, theta, seeds=len(bench.seeds), scope=scope, at=place)


def _exact_thetas(claim: Claim, bench: Bench, weights: Weights) -> list[Array]:
    """theta of each seed, by component (or their mean, or each step of a monotone claim). For ~ what is left of
    the margin."""
    sides = [bench.value(at, claim.left, weights) for at in range(len(bench.leaves))]
    if claim.monotone:
        flip = 1 if claim.relation == "monotone_up" else -1
        return [flip * (b - a) for a, b in pairwise(sides)]
    flip, right = -1 if claim.relation.startswith("<") else 1, claim.right or Number(0.0)
    found = []
    for at, left in enumerate(sides):
        other = bench.value(at, right, weights)
        margin = claim.margin * (numpy.abs(other) if claim.margin_relative else 1.0)
        gap = flip * (left - other)
        if claim.relation == "~":
            found.append(margin - numpy.abs(gap))
        else:
            found.append(gap + margin * (1 if claim.relation.endswith("=") else -1))
    return [_mean(found)] if claim.quantifier == "mean" else found


def _mean(values: Sequence[Array]) -> Array:
    averaged: Array = sum(values[1:], values[0]) / len(values)
    return averaged


def _holds(relation: str, theta: float) -> bool:
    rounding = 1e-12 * max(1.0, abs(theta))
    return theta > rounding if relation in _STRICT else theta >= -rounding


def _verdict(claim: Claim, parts: Sequence[Part], part: Part, p_for: float, p_against: float) -> Verdict:
    return Verdict(
        claim,
        INCONCLUSIVE,
        part.note,
        part.theta,
        part.low,
        part.high,
        p_for,
        p_against,
        mde=part.mde,
        needed=part.needed,
        df=part.df,
        samples=part.samples,
        seeds=part.seeds,
        scope=_scope(part.seeds),
        at=part.values,
        parts=tuple(parts),
    )


def _decided(found: Verdict, family: int) -> Verdict:
    """The verdict by the corrected p values, and why."""
    if found.p_for is None or found.p_against is None:
        return found
    p_for = found.p_for if found.p_for_adjusted is None else found.p_for_adjusted
    p_against = found.p_against if found.p_against_adjusted is None else found.p_against_adjusted
    found = replace(found, p_for_adjusted=p_for, p_against_adjusted=p_against)
    family_note = f" after Holm over {family} claims" if family > 1 else ""
    at = _at(found.at, " at ")
    if p_against < ALPHA:
        why = f"the opposite is found{at}: p {p_against:.2g}{family_note}"
        return replace(found, verdict=NOT_REPRODUCED, why="; ".join(filter(None, [why, found.why])))
    if p_for < ALPHA:
        why = f"p {p_for:.2g}{family_note}" + (
            f", the weakest{at}" if len(found.parts) > 1 and not found.claim.monotone else at
        )
        return replace(found, verdict=REPRODUCED, why="; ".join(filter(None, [why, found.why])))
    why = f"neither it nor its opposite is found{at}: p {p_for:.2g} for, {p_against:.2g} against{family_note}"
    return replace(found, verdict=INCONCLUSIVE, why="; ".join(filter(None, [why, found.why, _power(found)])))


def _power(found: Verdict) -> str:
    """What an inconclusive test could have seen, and what would decide."""
    text = f"an effect of {found.mde:.2g} would have been detected"
    if found.claim.relation == "~" or not found.estimate:
        return text
    if found.needed is None:
        return f"{text}; more seeds would decide, not more samples" if (found.seeds or 1) > 1 else text
    return f"{text}; about {found.needed} samples would decide at the observed {found.estimate:.2g}"


def _scope(seeds: int) -> str:
    if seeds == 1:
        return "this model, this calibration"
    return f"over {seeds} seeds" + ("" if seeds >= 3 else ", too few to speak of seeds")


def _at(values: Values, before: str = "", after: str = ": ") -> str:
    text = ", ".join(f"{key}={value}" for key, value in values.items())
    return (f"{before}{text}" if before else f"{text}{after}") if text else ""
