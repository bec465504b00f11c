"""The parts of a report one by one: labels, levels, fronts, SVG, tables, templates, published numbers."""

from __future__ import annotations

import json
from pathlib import Path

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
