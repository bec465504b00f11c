"""What the cells of a report call to show and to save: tables, figures, sentences. Files go into the working folder.

A table is saved as CSV (full precision), Markdown and LaTeX; a figure as PDF, SVG and PNG. What is displayed carries
its name, so that the page can make tables sort and points hover.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebench.reports.figures import Drawn
from sparsebench.reports.style import DPI
from sparsebench.reports.svg import annotated

if TYPE_CHECKING:
    from pandas import DataFrame

    from sparsebench.analysis.laws.result import Result

KEY = "sparsebench"  # of what outputs carry for the page
_NAMES = ("model", "task", "metric", "pattern", "axis", "sparsity counts zeros in")
_LONG = 36  # characters from which a column keeps some width on a narrow screen
_LONGEST = 2000  # rows of a table that a page shows; the CSV has all
_TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}  # fmt: skip

Bold = Mapping[str, Sequence[bool]]
"""Column -> which of its cells are printed bold."""


def says(*sentences: str) -> None:
    """Sentences that a cell computed, one below the other."""
    if sentences:
        text = "\n".join(f"- {one}" for one in sentences) if len(sentences) > 1 else sentences[0]
        _display({"text/markdown": text, "text/plain": text}, {"kind": "says"})


def title(name: str, question: str, facts: Mapping[str, str]) -> None:
    """The head of the report."""
    rows = "".join(f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(one)}</dd></div>" for key, one in facts.items())
    text = f'<h1>{html.escape(name)}</h1><p class="question">{html.escape(question)}</p><dl class="facts">{rows}</dl>'
    _display({"text/html": text, "text/plain": f"{name}: {question}"}, {"kind": "title"})


def warn(text: str) -> None:
    """A sentence that must not be overlooked."""
    _display({"text/html": f'<p class="warning">{html.escape(text)}</p>', "text/plain": text}, {"kind": "warning"})


def details(heading: str, text: str) -> None:
    """A longer text behind its heading."""
    shown = f"<details><summary>{html.escape(heading)}</summary><pre>{html.escape(text)}</pre></details>"
    _display({"text/html": shown, "text/plain": f"{heading}\n{text}"}, {"kind": "details"})


def measured(value: float, error: float, mark: str = "") -> str:
    """``mark`` and ``20.5 ± 0.84``; a value from ten thousand on without decimals. An error that is 0 or not known is
    not printed: outcomes that are all the same do not say that there is none."""
    spread = (
        f" ± {_number(error, '') if error >= 1e4 else format(error, '.2g') if error < 100 else format(error, '.0f')}"
    )
    return f"{mark}{_number(value, '')}{spread if error > 0 else ''}"


def with_interval(value: float, low: float, high: float) -> str:
    """``0.5 [0.4, 0.6]``, or that the interval is not known."""
    known = math.isfinite(low) and math.isfinite(high)
    return f"{value:.4g} [{low:.4g}, {high:.4g}]" if known else f"{value:.4g} (interval unknown)"


def duration(seconds: float) -> str:
    """``95 s``, ``12 min``, ``3.5 h``."""
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def file_name(*parts: str) -> str:
    """The parts as one name of a file: small letters, digits, dots and underscores."""
    return "-".join(re.sub(r"[^a-z0-9._]+", "_", str(part).lower()).strip("_") for part in parts)


def empty(why: str) -> None:
    """Why there is nothing to show in this section."""
    _display({"text/html": f'<p class="empty">{html.escape(why)}</p>', "text/plain": why}, {"kind": "empty"})


def table(
    frame: DataFrame,
    name: str,
    caption: str,
    *,
    digits: Mapping[str, str] | None = None,
    bold: Bold | None = None,
    order: Mapping[str, Sequence[float]] | None = None,
    link: str | None = None,
) -> None:
    """Shows ``frame`` and saves it as ``tables/<name>.csv``, ``.md`` and ``.tex``.

    ``digits``: column -> format of its numbers (else 4 significant digits); ``bold``: cells in bold; ``order``: the
    numbers that a column of texts is sorted by; ``link``: a column of run ids, which points of figures lead to. What
    is shown leaves out names that are the same in every row (the caption tells them) and rows beyond 2,000.
    """
    folder = Path("tables")
    folder.mkdir(exist_ok=True)
    csv(frame, f"tables/{name}.csv")
    texts = _texts(frame, digits or {})
    (folder / f"{name}.md").write_text(_markdown(texts, bold or {}), encoding="utf-8")
    (folder / f"{name}.tex").write_text(_latex(texts, bold or {}, name, caption, frame), encoding="utf-8")
    shown = _html(frame.head(_LONGEST), texts, name, caption, bold or {}, order or {}, link)
    _display({"text/html": shown, "text/plain": _markdown(texts[:60], bold or {})}, {"kind": "table", "name": name})


def html_table(frame: DataFrame, name: str, caption: str) -> str:
    """The HTML that ``table`` shows, for pages that no notebook makes."""
    return _html(frame, _texts(frame, {}), name, caption, {}, {}, None)


def csv(frame: DataFrame, path: str) -> None:
    """UTF-8, header, dot decimal, full precision. Lists become texts joined by ``; ``."""
    plain = frame.map(lambda one: "; ".join(map(str, one)) if isinstance(one, (list, tuple)) else one)
    Path(path).write_text(plain.to_csv(index=False, lineterminator="\n"), encoding="utf-8")


def write_json(content: Any, path: str) -> None:
    """Sorted keys, full precision; what is not finite becomes null."""
    text = json.dumps(_finite(content), indent=1, sort_keys=True, allow_nan=False, default=str)
    Path(path).write_text(text + "\n", encoding="utf-8")


def figure(drawn: Drawn, name: str, caption: str, alt: str) -> None:
    """Shows the figure and saves it as ``figures/<name>`` in three formats; call it inside ``drawing(name)``."""
    folder = Path("figures")
    folder.mkdir(exist_ok=True)
    drawn.figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "Title": alt})
    drawn.figure.savefig(folder / f"{name}.png", dpi=DPI, metadata={"Software": "matplotlib", "Title": alt})
    buffer = io.StringIO()
    drawn.figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": alt})
    (folder / f"{name}.svg").write_text(buffer.getvalue(), encoding="utf-8")
    content = {
        "image/svg+xml": annotated(buffer.getvalue(), name, drawn.marks, alt),
        "image/png": (folder / f"{name}.png").read_bytes(),
        "text/plain": f"{alt} ({caption})",
    }
    _display(content, {"kind": "figure", "name": name, "caption": caption, "alt": alt})


def laws(results: Sequence[Result], source: str) -> None:
    """Fits: their description, picture, and (several) comparison. Saves ``fits.json`` and each fit's resamples as
    ``fits/<law>.csv``, one row a resample."""
    from pandas import DataFrame

    from sparsebench.analysis.laws import text
    from sparsebench.analysis.laws.figure import SUFFIXES, draw

    saved = []
    for result in results:
        Path("fits").mkdir(exist_ok=True)
        Path("figures").mkdir(exist_ok=True)
        drawing = file_name("law", result.name)
        file = f"fits/{file_name(result.name)}.csv"
        csv(DataFrame(result.bootstrap.matrix, columns=list(result.bootstrap.names)), file)
        saved.append({**result.to_json(), "filter": None, "resample_matrix": file})
        draw([result], *(Path(f"figures/{drawing}{suffix}") for suffix in SUFFIXES))
        drawn = Path(f"figures/{drawing}.svg").read_text(encoding="utf-8")
        alt = f"Fit of {result.fit.law.formula} with its residuals"
        facts = {"kind": "figure", "name": drawing, "caption": f"{result.name}, {source}.", "alt": alt}
        _display({"image/svg+xml": annotated(drawn, drawing, {}, alt), "text/plain": alt}, facts)
    if len(results) > 1:
        _compared(results, source)
    if results:
        details("The fits in numbers", text.described(results, []))
    write_json(saved, "fits.json")


def _compared(results: Sequence[Result], source: str) -> None:
    """The laws side by side by what they predict of what was left out; relative and absolute errors share no axis."""
    from pandas import DataFrame

    from sparsebench.reports.cost_figures import law_comparison
    from sparsebench.reports.style import drawing

    rows = [
        {"law": one.name, "left_out": left.column, "rows": left.n, "error": left.error, "measure": one.measure}
        for one in results
        for left in one.left_out
        if left.error is not None
    ]
    if not rows:
        return
    for at, measure in enumerate(dict.fromkeys(str(row["measure"]) for row in rows)):
        name = f"law_comparison-{at}" if at else "law_comparison"
        with drawing(name):
            own = [row for row in rows if row["measure"] == measure]
            figure(law_comparison(own, measure), name, f"Extrapolation errors of the laws ({measure}), {source}.",
                   f"{measure.capitalize()} of each law on the rows that were left out")  # fmt: skip
    table(DataFrame(rows), "law_comparison", f"Errors of each law on what it was not fitted to, {source}.")


def _display(content: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    from IPython import display

    display.display(dict(content), raw=True, metadata={KEY: dict(facts)})


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def _texts(frame: DataFrame, digits: Mapping[str, str]) -> list[list[str]]:
    """The header and the rows as texts."""
    columns = []
    for name, values in frame.items():
        spec = digits.get(str(name), "")
        columns.append([str(name), *(_text(one, spec) for one in values)])
    return [list(row) for row in zip(*columns, strict=True)] if columns else [[]]


def _text(value: Any, spec: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if hasattr(value, "item"):
        return _text(value.item(), spec)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return _number(value, spec) if isinstance(value, float) else str(value)


def _number(value: float, spec: str) -> str:
    """Four significant digits, whole numbers with commas from ten thousand on."""
    if spec:
        return format(value, spec)
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e10 else f"{value:.4g}"


def _bold(bold: Bold, column: str, row: int) -> bool:
    return column in bold and bool(bold[column][row])


def _markdown(texts: list[list[str]], bold: Bold) -> str:
    head, *rows = texts
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for at, row in enumerate(rows):
        cells = [f"**{text}**" if _bold(bold, name, at) else text for name, text in zip(head, row, strict=True)]
        lines.append(f"| {' | '.join(one.replace('|', '/') for one in cells)} |")
    return "\n".join(lines) + "\n"


def _latex(texts: list[list[str]], bold: Bold, name: str, caption: str, frame: DataFrame) -> str:
    """A booktabs table; needs no package but booktabs."""
    head, *rows = texts
    sides = "".join("r" if _numeric(frame[column]) else "l" for column in frame)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escaped(caption)}}}", rf"\label{{tab:{name}}}"]
    lines += [rf"\begin{{tabular}}{{{sides}}}", r"\toprule", " & ".join(map(_escaped, head)) + r" \\", r"\midrule"]
    for at, row in enumerate(rows):
        cells = [
            rf"\textbf{{{_escaped(text)}}}" if _bold(bold, column, at) else _escaped(text)
            for column, text in zip(head, row, strict=True)
        ]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _escaped(text: str) -> str:
    plain = "".join(_TEX.get(letter, letter) for letter in text)
    return plain.replace("±", r"$\pm$").replace("≥", r"$\geq$")


def _numeric(column: Any) -> bool:
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    return bool(is_numeric_dtype(column)) and not is_bool_dtype(column)


def _html(
    frame: DataFrame,
    texts: list[list[str]],
    name: str,
    caption: str,
    bold: Bold,
    order: Mapping[str, Sequence[float]],
    link: str | None,
) -> str:
    """A plain table; ``data-order`` gives sorting the full precision, ``data-filter`` marks columns of few words."""
    head, rows = texts[0], len(texts) - 1
    same = {
        at: texts[1][at] for at, column in enumerate(head) if column in _NAMES and rows > 1 and _constant(texts, at)
    }
    notes = [f"{head[at]} {text}" for at, text in same.items() if text]
    said = html.escape(f"{caption.rstrip('.')} ({', '.join(notes)})." if notes else caption)
    if rows > len(frame):
        said += f" <em>The first {len(frame)} of {rows} rows; all are in tables/{name}.csv.</em>"
    keys = {column: _numbers(frame[column]) for column in frame if _numeric(frame[column])} | dict(order)
    columns = [at for at in range(len(head)) if at not in same]
    parts = [f'<table id="table-{name}" class="data"><caption><span>{said}</span></caption><thead><tr>']
    for at in columns:
        own = ' class="number"' if head[at] in keys else ""
        own += ' data-filter="yes"' if head[at] not in keys and _few_words(frame[head[at]].map(str)) else ""
        parts.append(f"<th{own}>{html.escape(head[at])}</th>")
    parts.append("</tr></thead><tbody>")
    long = [max((len(row[at]) for row in texts[1:]), default=0) > _LONG for at in range(len(head))]
    for row, cells in enumerate(texts[1 : len(frame) + 1]):
        parts.append("<tr>")
        for at in columns:
            own = f' class="number" data-order="{_order(keys[head[at]][row])}"' if head[at] in keys else ""
            cell = html.escape(cells[at])
            if head[at] == link and cell:
                own, cell = f' id="run-{cell}"', f"<code>{cell}</code>"
            elif _bold(bold, head[at], row):
                cell = f"<strong>{cell}</strong>"
            parts.append(f"<td{own or (' class=long' if long[at] else '')}>{cell}</td>")
        parts.append("</tr>")
    return "".join([*parts, "</tbody></table>"])


def _constant(texts: list[list[str]], at: int) -> bool:
    return all(row[at] == texts[1][at] for row in texts[1:])


def _numbers(column: Any) -> list[float]:
    return [float("nan") if one is None else float(one) for one in column.tolist()]


def _few_words(texts: Any) -> bool:
    """Whether a column holds few short texts, so that one can be picked from a list."""
    distinct = texts.unique()
    return 1 < len(distinct) <= 16 and max(map(len, distinct)) <= 28


def _order(value: float) -> str:
    return "" if value != value else repr(float(value))
