"""What a report says about its sweep beside its numbers: verdicts, fairness, what methods count, fits, limitations."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebench.analysis import fairness, fitted, ledger
from sparsebench.analysis.claims_command import row as ledger_row
from sparsebench.reports.data import DENSE, SweepData

if TYPE_CHECKING:
    from pandas import DataFrame

_RESAMPLES = 200  # of a fit's bootstrap
_FEW = 100  # samples below which a report says that they are few
VERDICT_COLUMNS = (
    "id paper place sentence test kind tiny_scale counts verdict estimate low high p_for p_against p_for_adjusted "
    "p_against_adjusted mde needed df samples seeds scope at why".split()
)


def verdicts(sweep: SweepData) -> tuple[DataFrame, list[dict[str, Any]]]:
    """The sweep's claims as a table (VERDICT_COLUMNS) and with everything that is known (parts, published).

    They are those of the ledger: corrected over all claims of their papers, whatever sweep states them.
    """
    from pandas import DataFrame

    if sweep.spec is None or not sweep.spec.claims:
        return DataFrame(columns=VERDICT_COLUMNS), []
    papers = list(dict.fromkeys(claim.paper for claim in sweep.spec.claims))
    found = ledger.build(sweep.workspace, sweep.store, papers)
    entries = [entry for entry in found.entries if entry.sweep == sweep.name and entry.verdict]
    rows = [ledger_row(one) | {"counts": bool(one.verdict and one.verdict.counts)} for one in entries]
    return DataFrame(rows, columns=VERDICT_COLUMNS), rows


def unfair(sweep: SweepData, allow_unfair: bool = False) -> list[fairness.Finding]:
    """What speaks against comparing the sweep's methods at the same request, the worst first."""
    import pandas

    rows = sweep.runs[sweep.runs["state"].isin(("ok", "flagged"))]
    plain = rows.astype(object).where(pandas.notna(rows), None).to_dict("records")
    methods = fairness.declared(sweep.workspace, sweep.runs["method"].unique())
    own = [key for key in sweep.runs if str(key).startswith(("model.", "task."))]
    axes = ["model", "task", *own, "sparsity", "pattern"]
    return fairness.check(plain, methods, axes=axes, policy=fairness.Policy(allow_unfair=allow_unfair))


def about_methods(sweep: SweepData) -> DataFrame:
    """What each method is: summary, paper, what its sparsity counts, when the mask is found, what happens then."""
    from pandas import DataFrame

    rows = []
    for label, parts in fairness.declared(sweep.workspace, sweep.runs["method"].unique()).items():
        for part in parts:
            kind = part.taxonomy
            rows.append(
                {
                    "method": label,
                    "part": part.name,
                    "version": part.version,
                    "what": part.summary,
                    "paper": part.paper,
                    "sparsity counts zeros in": kind.object,
                    "granularity": ", ".join(kind.granularity),
                    "mask found": kind.when_mask_is_found.replace("_", " "),
                    "weights updated": kind.weights_updated_after_mask.replace("_", " "),
                    "data needed": kind.data_need.replace("_", " "),
                }
            )
    return DataFrame(rows)


def descriptions(sweep: SweepData) -> dict[str, str]:
    """Method part -> the documentation of its file: formula, what is counted, deviations from the paper."""
    found: dict[str, str] = {}
    for parts in fairness.declared(sweep.workspace, sweep.runs["method"].unique()).values():
        for part in parts:
            found.setdefault(part.name, ast.get_docstring(ast.parse(Path(part.file).read_text(encoding="utf-8"))) or "")
    return found


def who_is_ahead(best: DataFrame) -> list[str]:
    """A sentence of ``levels.significantly_best``: which methods are significantly ahead, and how often. None where
    nothing was compared."""
    compared = best[best["second"].notna()]
    if compared.empty:
        return []
    points = f"{len(compared)} comparisons, each of one model, task and sparsity,"
    won = compared[compared["ahead"]].groupby("best", sort=False).size().sort_values(ascending=False, kind="stable")
    if won.empty:
        return [f"In none of {points} one method is clearly ahead of the second best."]
    who = ", ".join(f"**{name}** in {count}" for name, count in won.items())
    rest = len(compared) - int(won.sum())
    return [
        f"Of {points} clearly ahead of the second best (paired difference, p < .05): {who}"
        + (f"; in {rest} no method is." if rest else ".")
    ]


def what_is_safe(safe: DataFrame) -> list[str]:
    """A sentence of ``levels.safe``: the largest sparsity that is shown to be safe, somewhere and everywhere, with all
    who share it. None where there are no levels."""
    if safe.empty:
        return []
    tested = safe[safe["n"].notna()]
    if tested.empty:
        return [f"No sparsity is shown to be safe: {safe['says'].iloc[0]}."]
    level = tested["non_inferior"].fillna(0.0).round(2)  # levels that print alike are ties
    if not level.any():
        few = f"n = {tested['n'].min():.0f}"
        return [f"No sparsity is shown to be safe: at no level a loss of 0.02 or more is ruled out ({few})."]
    top = tested[level == level.max()]
    where = "{method} on {model}, {task}".format(**top.iloc[0]) + (f", and {len(top) - 1} more" if len(top) > 1 else "")
    floor = level.groupby(tested["method"], sort=False).min()
    names = ", ".join(floor.index[floor == floor.max()])
    everywhere = f"on each of its models and tasks: {floor.max():.2f} with {names}"
    return [
        f"The largest sparsity at which a loss of 0.02 or more is ruled out: **{level.max():.2f}** with {where}; "
        + (f"{everywhere}." if floor.max() > 0 else "no method has one on each of its models and tasks.")
    ]


def limitations(sweep: SweepData, counted: DataFrame) -> list[str]:
    """What the numbers cannot say, from facts about the runs. ``counted``: those that count."""
    said = []
    missing = len(sweep.runs) - len(counted)
    if missing:
        said.append(f"{missing} of {len(sweep.runs)} planned runs do not count (see What was run).")
    seeds = counted[counted["seed"].notna()].groupby("method_label")["seed"].nunique() if "seed" in counted else None
    if seeds is not None and len(seeds) and int(seeds.min()) < 3:
        few = ", ".join(seeds[seeds < 3].index)
        said.append(f"Fewer than three seeds of {few}: nothing is known of their spread over seeds.")
    smallest = counted["n"].min()
    if smallest == smallest and smallest < _FEW:
        said.append(f"As few as {smallest:.0f} samples an evaluation: only large differences can be seen.")
    models = sorted(one for one in counted["model"].unique() if str(one).startswith("tiny_"))
    if models:
        said.append(
            f"{', '.join(models)}: small models trained by this project on two corpora; large models are more "
            "redundant and have outlier features that these lack, so levels do not carry over, orders may."
        )
    if not first(counted, ["ms_prefill"]):
        said.append(
            "No run was timed with a sparse kernel: savings in time are not known, FLOPs and bytes are counted."
        )
    if counted["task_label"].nunique() == 1:
        said.append(f"One task ({counted['task_label'].iloc[0]}): other tasks may break earlier.")
    return said


def parameters(runs: DataFrame) -> Any:
    """The parameters of each run's dense model, from its bytes and dtype (a column of numbers, gaps where unknown)."""
    if "bytes_weights_dense" not in runs or "dtype" not in runs:
        return runs["score"] * float("nan")
    return runs["bytes_weights_dense"].astype(float) / runs["dtype"].map(fitted.BYTES)


def fits(counted: DataFrame) -> tuple[list[Any], list[str]]:
    """The scaling laws that these records can carry, fitted, and why the others were not.

    ``chinchilla``: loss over parameters and training tokens (column train_tokens); ``frontier``: accuracy over
    parameters, context length and compression; ``power``: the dense models' loss over parameters.
    """
    from sparsebench.analysis.laws import registry
    from sparsebench.analysis.laws.result import Settings, analyse
    from sparsebench.errors import UserError

    found, reasons = [], []
    for name, points, why in _candidates(counted.assign(parameters=parameters(counted))):
        if why:
            reasons.append(f"{name}: {why}")
            continue
        columns = list(registry.get(name).numeric)
        try:
            drop = {one: points[one].to_numpy(dtype=float) for one in columns}
            found.append(analyse(points, registry.get(name), Settings(bootstrap=_RESAMPLES), name=name, drop_by=drop))
        except UserError as error:
            reasons.append(f"{name}: {error}")
    return found, reasons


def _candidates(runs: DataFrame) -> list[tuple[str, DataFrame, str]]:
    """(law, its points, why there are too few)."""
    loss = runs[runs["metric"] == "perplexity"].assign(value=lambda rows: -rows["quality"])
    dense = loss[loss["method"] == DENSE].rename(columns={"parameters": "x"})
    power = dense[["x", "value"]].dropna() if len(dense) else dense.reindex(columns=["x", "value"])
    trained = loss.reindex(columns=["parameters", "train_tokens", "value"]).dropna()
    trained = trained.rename(columns={"parameters": "N", "train_tokens": "D"})
    acc = runs[runs["metric"].isin(("acc", "accuracy"))].rename(columns={"parameters": "N", "context": "L"})
    acc = acc.assign(
        compression=1 / (1 - acc["achieved"].clip(upper=0.999)), task=acc["task_label"], value=acc["score"]
    )
    acc = acc.reindex(columns=["N", "L", "compression", "task", "value"]).dropna()
    tokens = "the runs differ in training tokens, too" if trained["D"].nunique() > 1 else ""
    return [
        ("chinchilla", trained, _too_few(trained, {"N": 3, "D": 3}, "parameters and training tokens")),
        ("frontier", acc, _too_few(acc, {"N": 2, "L": 2, "compression": 3}, "sizes, context lengths and compressions")),
        ("power", power, tokens or _too_few(power, {"x": 4}, "sizes of dense models")),
    ]


def _too_few(points: DataFrame, least: Mapping[str, int], what: str) -> str:
    counts = {name: int(points[name].nunique()) for name in least}
    if all(counts[name] >= needed for name, needed in least.items()):
        return ""
    shown = ", ".join(f"{name} has {counts[name]} of {needed}" for name, needed in least.items())
    return f"too few different {what} ({shown} values that are needed)"


def blocks(layers: DataFrame, methods: Mapping[str, str]) -> DataFrame:
    """Per-layer rows with their method label, block index and module name: that behind the index (``q_proj`` of
    ``model.layers.0.self_attn.q_proj``), else before it (``attention.0``). Layers outside blocks are left out."""
    parts = layers["layer"].str.extract(r"(?P<before>[^.]+)\.(?P<block>\d+)(?:\.(?:.*\.)?(?P<behind>[^.]+))?$")
    module = parts["behind"].fillna(parts["before"])
    found = layers.assign(method=layers["run_id"].map(methods), block=parts["block"], module=module)
    found = found.dropna(subset=["block", "module", "achieved"])
    return found.assign(block=found["block"].astype(int))


def grid(runs: DataFrame) -> DataFrame:
    """What the plan varies: key and its values; and what it holds fixed, in one line each."""
    from pandas import DataFrame

    keys = ["model", "task", "calibration", "method", "sparsity", "pattern", "seed"]
    keys += [key for key in runs if str(key).startswith(("model.", "task.", "calibration."))]
    rows = []
    for key in keys:
        if key not in runs:
            continue
        values = list(dict.fromkeys(one for one in runs[key] if one is not None and one == one))
        if values:
            shown = ", ".join(
                f"{one:g}" if isinstance(one, float) else str(one) for one in itertools.islice(values, 30)
            )
            rows.append({"key": key, "values": shown, "varies": len(values) > 1})
    return DataFrame(rows, columns=["key", "values", "varies"])


def condition(one: Mapping[str, Any]) -> str:
    """An exclusion of a sweep in words: ``task.protocol=windows with method=quest or snapkv``."""
    return " with ".join(
        f"{key}={' or '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
        for key, value in one.items()
    )


def first(frame: DataFrame, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are columns of ``frame`` and not empty."""
    return [name for name in names if name in frame and frame[name].notna().any()]
