"""Fits as text for people: at least four significant digits; the full ones are in the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsebench.analysis.laws.compare import LeftOut
from sparsebench.analysis.laws.result import Result, compared


def described(results: Sequence[Result], notes: Sequence[str]) -> str:
    """Each fit with its checks; several are compared first, the best in extrapolation on top."""
    parts = [_comparison(results)] if len(results) > 1 else []
    parts += [_one(result) for result in results]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])]) + "\n"


def _one(result: Result) -> str:
    fit = result.fit
    loss = fit.problem.loss + (f" {fit.problem.delta:g}" if fit.problem.loss == "huber" else "")
    clip = f", logits clipped at {result.extra['clip']:g}" if fit.problem.loss != "binomial" and _logit(result) else ""
    lines = [f"{result.name}: {fit.law.formula}", f"{fit.n} rows, loss {loss} on {fit.law.link}{clip}"]
    lines += aligned([["parameter", "value", "95% interval", "standard error"], *_parameters(result)])
    lines.append(
        f"objective {fit.objective:.6g}, {fit.at_best} of {len(fit.starts)} starts there, "
        f"condition {result.condition:.4g}"
    )
    lines.append(result.measure + f" {_number(result.quality['error'])} in sample")
    lines += [f"  {_number(one.error)} {_left_out(one)}" for one in result.left_out if one.error is not None]
    laplace, gaussian = result.quality["aicc_laplace"], result.quality["aicc_gaussian"]
    lines.append(
        f"AICc {_number(laplace)} (Laplace), {_number(gaussian)} (Gaussian), R2 {_number(result.quality['r2'])}"
    )
    tests = result.residuals
    trend = min((p for _, p in tests.trends.values()), default=1.0)
    lines.append(
        f"residuals: mean {tests.mean:.3g}, {tests.positive} of {tests.n} positive (sign test p {tests.sign_p:.3g}), "
        f"strongest trend p {trend:.3g}"
    )
    if result.identifiable:
        lines += _allocation(result)
    else:
        lines.append("NOT IDENTIFIABLE: use predictions within the data only")
        lines += [f"  {doubt}" for doubt in result.doubts]
    lines += _other_fits(result)
    lines += [f"warning: {warning}" for warning in result.warnings]
    return "\n".join(lines)


def _parameters(result: Result) -> list[list[str]]:
    """One row a parameter; what is not determined is not printed."""
    rows = []
    for name, value in result.fit.params.items():
        if result.fit.law.parameters[name].exponent and not result.identifiable:
            rows.append([name, "not determined", "-", "-"])
            continue
        span = result.bootstrap.interval(name)
        between = f"[{span[0]:.6g}, {span[1]:.6g}]" if span else "-"
        rows.append([name, f"{value:.6g}", between, _number(result.bootstrap.se(name))])
    return rows


def _logit(result: Result) -> bool:
    return result.fit.law.link == "logit"


def _left_out(one: LeftOut) -> str:
    rows = "1 row" if one.n == 1 else f"{one.n} rows"
    return f"on the {rows} with {one.column} >= {_number(one.lowest)}, fitted without them"


def _allocation(result: Result) -> list[str]:
    """Where a compute budget goes, for a law that says it."""
    found = result.extra.get("allocation")
    if not found:
        return []
    band = f" [{found['low']:.4g}, {found['high']:.4g}]" if found["low"] is not None else ""
    lines = [f"compute-optimal at C = 6 N D FLOPs: N* ~ C^{found['a']:.4g}{band}, tokens per parameter (80% band):"]
    for one in found["budgets"]:
        span = f" [{one['low']:.4g}, {one['high']:.4g}]" if one["low"] is not None else ""
        lines.append(f"  {one['tokens_per_parameter']:.4g}{span} at C = {one['flops']:.3g}")
    return lines


def _other_fits(result: Result) -> list[str]:
    """The fit with the floor 0 and the one without the filter, where there are any."""
    lines = []
    for key, found in result.extra.items():
        if key.startswith("with_"):
            lines.append(f"{key.replace('_', ' ')}: objective {found['objective']:.6g}, {_values(found['parameters'])}")
    found = result.extra.get("filter")
    if found:
        without = found["without"]
        lines.append(
            f"only {found['only']}: {found['excluded']} rows excluded; with them: {_values(without['parameters'])}"
        )
    return lines


def _values(parameters: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in parameters.items())


def _comparison(results: Sequence[Result]) -> str:
    found = compared(results)
    columns = list(dict.fromkeys(column for row in found["rows"] for column in row["left_out"]))
    heads = [f"error without highest {column}" for column in columns]
    rows = [["law", "rows", "parameters", *heads, "AICc", "AICc Gauss", "objective", "error", "R2", "identifiable"]]
    for row in found["rows"]:
        rows.append([
            row["name"], str(row["n"]), str(row["k"]), *(_number(row["left_out"].get(one)) for one in columns),
            _number(row["aicc_laplace"]), _number(row["aicc_gaussian"]), _number(row["objective"]),
            _number(row["error"]), _number(row["r2"]), "yes" if row["identifiable"] else "no",
        ])  # fmt: skip
    order = found["by_aicc"]
    aicc = f"inconclusive ({found['note']})" if isinstance(order, str) else " < ".join(order)
    best = found["by_extrapolation"]
    return "\n".join([*aligned(rows), f"by extrapolation: {' < '.join(best) or 'not known'}", f"by AICc: {aicc}"])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows with the first column left, the others right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(
            text.ljust(width) if at == 0 else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.5g}"
