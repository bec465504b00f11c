"""The parts of a report one by one: labels, levels, fronts, SVG, tables, templates, published numbers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas
import pytest

from sparsebench.paths import data_folder
from sparsebench.reports import facts, figures, levels, notebook, published, show, style
from sparsebench.reports.data import _Labels
from sparsebench.reports.svg import annotated

S = np.round(np.arange(10) * 0.1, 1)
ACCURACY = np.array([0.80, 0.80, 0.80, 0.79, 0.79, 0.78, 0.70, 0.55, 0.40, 0.30])


def curve(scores: np.ndarray = ACCURACY) -> pandas.DataFrame:
    """The levels of one method and its dense model, as the notebook makes them."""
    method = ["dense", *["pruner"] * (len(S) - 1)]
    frame = pandas.DataFrame({"model": "m", "task": "t", "method": method, "requested": S, "achieved": S})
    frame["quality"] = frame["score"] = scores
    return frame.assign(
        metric="accuracy", better="higher", hollow=False, se=0.01, ci_low=scores - 0.02, ci_high=scores + 0.02,
        n=100, seeds=1, flags="", run_ids=[[f"r{k}"] for k in range(len(S))],
    )  # fmt: skip


def test_knees_of_the_worked_example() -> None:
    """Four rules on one curve, and what it keeps."""
    row = levels.knees(curve()).iloc[0]
    assert (row["tolerance"], row["breakpoint"], row["chord"]) == (0.4, 0.5, 0.5)
    assert row["hinge"] == pytest.approx(0.532)
    assert row["sharpness"] == pytest.approx(31.5, abs=0.05)
    whole = curve()
    whole.loc[0, "method"] = "pruner"  # the example's area begins at 0
    both = pandas.concat([curve().head(1), whole])
    assert levels.retention(both)["retention"].iloc[0] == pytest.approx(0.8556, abs=5e-5)


def test_front_of_the_worked_example() -> None:
    points = pandas.DataFrame({"cost": [1.0, 1.0, 2.0, 2.0], "quality": [0.60, 0.66, 0.70, 0.55], "se": 0.02})
    points = points.assign(model="m", task="t", run_ids=[["a"], ["b"], ["c"], ["d"]])
    found = levels.front(points, "cost", {})
    assert found["front"].tolist() == [False, True, True, False]
    assert found["share"].tolist() == pytest.approx([0.019, 0.981, 0.92, 0.0], abs=0.02)


def test_methods_are_interpolated_along_their_own_curve_only() -> None:
    own = curve()
    own.loc[own["requested"] == 0.5, "achieved"] = 0.55
    own = own[own["requested"] != 0.9]
    found = levels.matched(own, {}).set_index("at")
    assert not found.loc[0.4, "interpolated"]
    assert found.loc[0.5, "interpolated"]
    assert found.loc[0.5, "quality"] == pytest.approx(0.79 + (0.78 - 0.79) * 0.1 / 0.15)
    assert 0.9 not in found.index, "beyond the end of the curve nothing is said"


def test_labels_name_what_varies_and_nothing_else() -> None:
    base = {"model": "tiny", "task": "t", "sparsity": 0.5, "pattern": "unstructured", "model.outliers": False}
    points = [
        {**base, "method": "wanda", "method.wanda.norm": "l1", "method.wanda.sparsity": 0.5},
        {**base, "method": "wanda", "method.wanda.norm": "l2", "method.wanda.sparsity": 0.6, "model.outliers": True},
        {**base, "method": "magnitude", "pattern": "2:4"},
        {**base, "method": "h2o", "sparsity": None, "method.h2o.budget": 64},
        {**base, "method": "h2o", "sparsity": None, "method.h2o.budget": 128},
    ]
    found = [_Labels(points).of(point) for point in points]
    assert [one["method_label"] for one in found] == ["wanda norm=l1", "wanda norm=l2", "magnitude 2:4", "h2o", "h2o"]
    assert [one["model_label"] for one in found] == ["tiny", "tiny outliers", "tiny", "tiny", "tiny"]
    assert [one["level"] for one in found] == [0.5, 0.5, 0.5, 64.0, 128.0], (
        "a budget is the level of who has no sparsity"
    )


def test_every_method_keeps_its_look() -> None:
    few, more = style.looks(["dense", "a", "b"], []), style.looks(["dense", "random", "a", "b", "c"], ["random"])
    assert few["a"] == more["a"] and few["b"] == more["b"]
    assert more["random"].colour == style.GREY and more["dense"].colour == style.BLACK
    many = style.looks([f"m{k}" for k in range(12)], [])
    assert len({(one.colour, one.marker, one.dash) for one in many.values()}) == 13


def svg_of(drawn: figures.Drawn) -> str:
    import io

    buffer = io.StringIO()
    drawn.figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def test_every_point_of_a_figure_answers() -> None:
    table = curve()
    with style.drawing("f"):
        drawn = figures.tradeoff(
            table, style.looks(["dense", "pruner"], []), levels.knees(table), figures.limits(table)
        )
        text = annotated(svg_of(drawn), "f", drawn.marks, "what it shows")
    assert text.count('class="point"') == len(S)
    assert 'href="#run-r5"' in text and 'aria-label="what it shows"' in text
    assert "pruner: accuracy 0.78 [0.76, 0.8], sparsity 0.5000" in text
    drawn.marks["points-0"] = ("dense", [figures.Mark("a"), figures.Mark("b")])
    with pytest.raises(ValueError, match="1 markers were drawn for 2 points"):
        annotated(svg_of(drawn), "f", drawn.marks, "")


def test_tables_in_three_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(show, "_display", lambda content, facts: shown.append(dict(content)))
    frame = pandas.DataFrame({"a_b": ["x & y", "<z>"], "value": [0.123456789, np.nan], "n": [12345, 2]})
    show.table(frame, "t", "100% of it", bold={"value": [True, False]})
    assert (tmp_path / "tables/t.csv").read_text() == "a_b,value,n\nx & y,0.123456789,12345\n<z>,,2\n"
    assert "| x & y | **0.1235** | 12,345 |" in (tmp_path / "tables/t.md").read_text()
    latex = (tmp_path / "tables/t.tex").read_text()
    assert r"x \& y & \textbf{0.1235} & 12,345 \\" in latex and r"\caption{100\% of it}" in latex and r"a\_b" in latex
    html = shown[0]["text/html"]
    assert "&lt;z&gt;" in html and 'data-order="0.123456789"' in html and 'data-order=""' in html


def test_a_template_gets_all_its_parameters() -> None:
    given = {"SWEEP": "s", "STORE": "../..", "CONFIG_DIR": None, "DATE": "2026-01-01", "ALLOW_UNFAIR": False}
    book = notebook.built("sweep", given)
    source = next(cell.source for cell in book.cells if cell.id == "parameters")
    assert "SWEEP = 's'" in source and "CONFIG_DIR = None" in source
    assert [cell.id for cell in book.cells if cell.cell_type == "markdown"][:3] == ["in_short", "claims", "runs"]
    with pytest.raises(ValueError, match="parameters are"):
        notebook.built("sweep", {"SWEEP": "s"})


PUBLISHED = sorted((data_folder("reports") / "published").glob("*.csv"))


def test_published_numbers_keep_their_schema() -> None:
    assert len(PUBLISHED) > 50
    for file in PUBLISHED:
        found = published.load([file.stem])
        assert list(found) == published.COLUMNS, file.name
        assert set(found["paper"]) == {file.stem}, file.name
        assert found["value"].notna().all() and found["source"].notna().all(), file.name
        assert set(found["quality"]) <= set(published.QUALITIES), file.name
        assert found["sparsity"].dropna().between(0, 1).all(), file.name


def test_papers_without_numbers_give_an_empty_table() -> None:
    assert list(published.load(["no_such_paper"])) == published.COLUMNS


def trained() -> pandas.DataFrame:
    """Finished runs of the law 1.2 + 20/N^.3 + 150/D^.35 with 0.3% noise, as a report holds them."""
    noise = iter(np.random.default_rng(0).standard_normal(30))
    rows = []
    for size in (1e5 * 2**i for i in range(6)):
        for tokens in (1e6 * 4**j for j in range(5)):
            loss = (1.2 + 20 / size**0.3 + 150 / tokens**0.35) * np.exp(0.003 * next(noise))
            rows.append({"bytes_weights_dense": 4 * size, "train_tokens": tokens, "quality": -loss})
    common = {"dtype": "float32", "metric": "perplexity", "method": "dense", "task_label": "t", "achieved": 0.0}
    return pandas.DataFrame(rows).assign(**common, score=lambda rows: np.exp(-rows["quality"]))


def test_laws_are_fitted_where_the_records_carry_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(show, "_display", lambda content, facts: shown.append(dict(content)))
    monkeypatch.setattr(facts, "_RESAMPLES", 20)
    results, reasons = facts.fits(trained())
    assert [one.name for one in results] == ["chinchilla"]
    assert [one.partition(":")[0] for one in reasons] == ["frontier", "power"]
    show.laws(results, "a store")
    saved = json.loads((tmp_path / "fits.json").read_text())[0]
    assert saved["parameters"]["alpha"] == pytest.approx(0.302142, rel=1e-3)
    assert saved["loss"] == "huber" and saved["delta"] == 1e-3
    resamples = pandas.read_csv(tmp_path / saved["resample_matrix"])
    assert len(resamples) == 20 and set(resamples) == set(saved["parameters"])
    assert (tmp_path / "figures/law-chinchilla.pdf").is_file() and "svg" in shown[0]["image/svg+xml"]


def outcomes_of(values: np.ndarray, better: str = "higher") -> tuple[pandas.DataFrame, dict[Any, Any]]:
    """Two levels of one task, each of one run, with their outcomes (levels, samples)."""
    rows = [
        {"run_id": f"r{at}", "metric": "score", "score": float(own.mean()), "better": better, "task": "t"}
        for at, own in enumerate(values)
    ]
    samples = {f"r{at}": [{"sample": f"s{k}", "score": x} for k, x in enumerate(own)] for at, own in enumerate(values)}
    sign = 1 if better == "higher" else -1
    used = pandas.DataFrame(rows).assign(
        model_label="m", task_label="t", method_label=["dense", "pruner"], level=[np.nan, 0.5], quality_se=0.0,
        quality=lambda frame: sign * frame["score"],
    )  # fmt: skip
    group = levels._paired(SimpleNamespace(samples=samples), rows)  # type: ignore[arg-type]
    assert not group.why
    return used, {("m", "t"): group}


def test_all_right_is_not_known_to_be_right_always() -> None:
    """32 right of 32: the rule of three. The other level has shares of right answers, and its interval ends at 1."""
    shares = np.array([1.0] * 30 + [0.5, 0.75])
    for better, ends in (("higher", (1 - 3 / 32, 1.0)), ("lower", (-1.0, -1 + 3 / 32))):
        found = levels.errors(*outcomes_of(np.stack([np.ones(32), shares]), better))
        assert found["interval"].tolist() == ["rule of three", "jackknife t"]
        assert (found["low"][0], found["high"][0]) == pytest.approx(ends)
        assert found[["low", "high"]].abs().to_numpy().max() == 1.0 and (found["low"] < found["high"]).all()


def test_without_a_spread_among_few_samples_nothing_is_known() -> None:
    """Eight of eight: no interval, no bar, and a figure and a table that say so."""
    used, groups = outcomes_of(np.stack([np.ones(8), np.array([0.0, 1] * 4)]))
    found = levels.errors(used, groups)
    assert found["interval"].tolist() == ["unknown", "jackknife t"]
    assert np.isnan(found["low"][0]) and np.isnan(found["high"][0]) and found["high"][1] <= 1
    assert show.with_interval(1.0, found["low"][0], found["high"][0]) == "1 (interval unknown)"
    assert show.with_interval(1.0, -np.inf, np.inf) == "1 (interval unknown)"
    assert show.with_interval(0.5, 0.25, 0.75) == "0.5 [0.25, 0.75]"
    table = curve().assign(ci_low=-np.inf, ci_high=np.inf)
    low, high = figures.limits(table)
    assert np.isfinite([low, high]).all() and low < 0.3 < 0.8 < high
    table = curve().assign(ci_low=np.nan, ci_high=np.nan)
    with style.drawing("f"):
        drawn = figures.tradeoff(table, style.looks(["dense", "pruner"], []), levels.knees(table), (low, high))
        assert not drawn.figure.axes[0].containers, "no bars"
        assert "pruner: accuracy 0.78, sparsity 0.5000" in annotated(svg_of(drawn), "f", drawn.marks, "")


def test_a_range_of_scores_holds_the_naive_baselines_too() -> None:
    """Of perplexities they may be worse by any factor; scores have an end."""
    worse = curve(ACCURACY / 4).assign(method="random")
    both = pandas.concat([curve(), worse])
    assert figures.limits(both, ["random"])[0] < ACCURACY.min() / 4
    broken = both.assign(metric="perplexity", score=np.where(both["method"] == "random", 1e4, both["score"] * 10))
    broken = broken.assign(ci_low=broken["score"], ci_high=broken["score"])
    assert figures.limits(broken, ["random"])[1] < 10


def test_a_plateau_before_the_knee_has_no_slope() -> None:
    """What rounding leaves of a flat line is no slope to divide by."""
    falls = np.array([0.7, 0.7 + 1e-16, 0.7, 0.7 - 1e-16, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    row = levels.knees(curve(falls)).iloc[0]
    assert row["breakpoint"] == 0.3 and np.isinf(row["sharpness"])
    assert np.isnan(levels.knees(curve(np.full(10, 0.7)))["sharpness"].iloc[0]), "it never falls"


def test_layers_are_found_with_and_without_a_module_behind_their_index() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp", "attention.0", "kv_cache.11", "lm_head"]
    layers = pandas.DataFrame({"run_id": "r", "layer": names, "achieved": 0.5})
    found = facts.blocks(layers, {"r": "pruner"})
    assert found["block"].tolist() == [0, 1, 0, 11]
    assert found["module"].tolist() == ["q_proj", "mlp", "attention", "kv_cache"]


def safe_levels(**levels_of: list[float]) -> pandas.DataFrame:
    rows = [
        {"model": "m", "task": f"t{at}", "method": name, "non_inferior": one, "n": 200.0, "says": ""}
        for name, own in levels_of.items()
        for at, one in enumerate(own)
    ]
    return pandas.DataFrame(rows)


def test_what_is_safe_names_all_who_share_it() -> None:
    nan = float("nan")
    (said,) = facts.what_is_safe(safe_levels(a=[0.5, nan], b=[0.75, nan], c=[0.751, nan]))
    assert "**0.75** with b on m, t0, and 1 more; no method has one on each of its models and tasks." in said
    (said,) = facts.what_is_safe(safe_levels(a=[0.5, 0.25], b=[0.875, 0.5], c=[0.5, 0.5]))
    assert said.endswith("on each of its models and tasks: 0.50 with b, c.")
    (said,) = facts.what_is_safe(safe_levels(a=[nan, nan]))
    assert said == "No sparsity is shown to be safe: at no level a loss of 0.02 or more is ruled out (n = 200)."
    none = safe_levels(a=[nan]).assign(n=nan, says="no dense run to compare with")
    assert facts.what_is_safe(none) == ["No sparsity is shown to be safe: no dense run to compare with."]
    assert facts.what_is_safe(none[:0]) == []


def test_who_is_ahead_names_everyone_who_is() -> None:
    best = pandas.DataFrame({"best": ["a", "b", "a", "c"], "second": ["b", "a", "b", None], "ahead": [1, 1, 1, 0]})
    best["ahead"] = best["ahead"].astype(bool)
    (said,) = facts.who_is_ahead(best)
    assert said.startswith("Of 3 comparisons") and said.endswith("**a** in 2, **b** in 1.")
    (said,) = facts.who_is_ahead(best.assign(ahead=[False, True, False, False]))
    assert said.endswith("**b** in 1; in 2 no method is.")
    assert "In none of 3" in facts.who_is_ahead(best.assign(ahead=False))[0]


def test_an_exclusion_in_words() -> None:
    rule = {"task.protocol": ["windows"], "method": ["quest", "snapkv"]}
    assert facts.condition(rule) == "task.protocol=windows with method=quest or snapkv"


def test_a_benchmarks_own_score_stands_beside_that_benchmark_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = dict.fromkeys(published.COLUMNS, "") | {"method": "dense", "dataset": "LongBench average"}
    rows = [theirs | {"metric": "score", "value": 40.0}, theirs | {"metric": "accuracy", "value": 0.5}]
    unseen = {"method": "snapkv", "pattern": "unstructured", "sparsity": 0.5}  # ours has none
    rows.append(theirs | {"metric": "score", "value": 39.0} | unseen)
    ours = {"base": "dense", "pattern": "unstructured", "requested": 0.0, "score": 0.9, "model": "tiny_1m"}
    levels = pandas.DataFrame(
        [ours | {"task": task, "metric": metric}
         for task, metric in (("sf_niah", "score"), ("longbench", "score"), ("tinyworld", "accuracy"))]
    )  # fmt: skip
    monkeypatch.setattr(published, "load", lambda papers: pandas.DataFrame(rows))
    monkeypatch.setattr(published, "papers_of", lambda sweep: [])
    found = published.beside(cast(Any, None), levels)
    assert list(zip(found["metric"], found["our_task"], strict=True)) == [
        ("score", "longbench"), ("accuracy", "tinyworld"),
    ]  # fmt: skip
