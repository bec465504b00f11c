"""The verb ``fit``: a scaling law fitted to a CSV file or to the records of a sweep.

``fit <csv> law=<name> <variable>=<column> ... value=<column>`` or ``fit sweep=<name> [store=<folder>] ...``. Several
laws (``law=a,b``) or columns (``N=a,b``) are fitted side by side and compared. ``<column>=<value>`` chooses rows;
``only=<column>>=<number>`` filters them, and shows the fit without the filter too.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebench.declare import Declared, option, options_of
from sparsebench.errors import UserError, closest

if TYPE_CHECKING:
    from pandas import DataFrame

    from sparsebench.analysis.laws.base import Law
    from sparsebench.analysis.laws.result import Result

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "=": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_ONLY = re.compile(r"\s*(?P<column>[^<>=!]+?)\s*(?P<sign>>=|<=|!=|=|>|<)\s*(?P<number>[^<>=!]+)")


@dataclass(frozen=True)
class Options(Declared):
    """What ``fit`` takes beside the law's variables and the columns that choose rows."""

    law: str = option("", "the law's name, or several joined by commas")
    value: str = option("", "the column that holds what the law predicts")
    sweep: str | None = option(None, "fit the records of this sweep instead of a file")
    store: str | None = option(None, "the store that holds the sweep")
    group: str | None = option(None, "the column whose equal rows are resampled together, such as a training run")
    weights: str | None = option(None, "the column of row weights; for loss=binomial the number of samples")
    only: str | None = option(None, "a filter, such as D>=1e8, or several joined by commas")
    drop_highest: int = option(1, "how many highest values are left out to test the extrapolation, 0: none", low=0)
    drop_by: str | None = option(None, "the columns whose highest values are left out; the law's variables if empty")
    loss: str | None = option(
        None, "of the residuals; the law's own if empty", choices=("huber", "ols", "lad", "binomial")
    )
    delta: float = option(1e-3, "where Huber's loss turns from square to linear, link space", above=0)
    clip: float = option(1e-6, "how near to 0 and 1 the logit of an accuracy is taken", above=0, below=0.5)
    keep: int = option(12, "how many of the starts are optimised", low=1)
    bootstrap: int = option(1000, "resamples for the intervals, 0: none", low=0)
    seed: int = option(0, "of the resamples", low=0)
    plot: str | None = option(None, "a file for the picture of fit and residuals: .png, .pdf or .svg")
    format: str = option("table", "what is printed", choices=("table", "json"))


@dataclass(frozen=True)
class _Table:
    """``rows``: the table; ``places``: where each row stands, in words; ``notes``: what is missing from it."""

    rows: DataFrame
    places: list[str]
    source: str
    notes: list[str]

    def chosen(self, mask: Sequence[bool]) -> _Table:
        places = [place for place, keep in zip(self.places, mask, strict=True) if keep]
        return replace(self, rows=self.rows.loc[list(mask)].reset_index(drop=True), places=places)


def run(names: Sequence[str], given: dict[str, str], default_store: Path) -> str:
    """The fit as text: a table for people, or JSON in full precision. UserError on bad input.

    JSON of one fit: {law, n, parameters, ci, objective, identifiable, warnings, ...}; of several: {fits, comparison}.
    """
    from sparsebench.analysis.laws import registry, text

    options = _options(given)
    laws = [registry.get(name.strip()) for name in options.law.split(",")]
    picture = _picture(options.plot)
    table = _read(names, options, default_store)
    variables = {name for law in laws for name in (*law.variables, *law.aliases)}
    table = _selected(table, given, variables)
    candidates = _candidates(laws, given, options, table)
    left = _left(candidates, table, options)
    results = [_fitted(name, law, columns, left, table, options) for name, law, columns in candidates]
    if picture:
        from sparsebench.analysis.laws.figure import draw

        draw(results, picture)
    notes = [*table.notes, *([f"picture: {picture}"] if picture else [])]
    if options.format == "table":
        return text.described(results, [f"note: {note}" for note in notes])
    return _json(results, table, given)


def _options(given: Mapping[str, str]) -> Options:
    found: dict[str, Any] = {}
    for name, spec in options_of(Options).items():
        if name in given:
            value: Any = given[name].strip()
            if spec.type in ("int", "float"):
                value = _number(value, spec.type)
            found[name] = spec.check(name, value)
    options = Options(**found)
    if not options.law:
        from sparsebench.analysis.laws import registry

        raise UserError(f"law: name the law to fit, law=<name>; valid: {', '.join(registry.names())}")
    if not options.value:
        raise UserError("value: name the column that the law predicts, value=<column>")
    return options


def _number(text: str, kind: str) -> Any:
    """The text as a number where it is one; ``Option.check`` says what is wrong with it otherwise."""
    for read in (int, float) if kind == "int" else (float,):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _picture(plot: str | None) -> Path | None:
    from sparsebench.analysis.laws.figure import SUFFIXES

    if plot is None:
        return None
    file = Path(plot).expanduser()
    if file.suffix not in SUFFIXES:
        raise UserError(f"plot={plot}: must end in {', '.join(SUFFIXES)}")
    if not file.parent.is_dir():
        raise UserError(f"plot={plot}: there is no folder {file.parent}")
    return file


def _read(names: Sequence[str], options: Options, default_store: Path) -> _Table:
    if options.sweep is not None:
        if names:
            raise UserError(f"fit {names[0]}: takes a file or sweep=<name>, not both")
        return _read_sweep(options.sweep, Path(options.store).expanduser() if options.store else default_store)
    if options.store is not None:
        raise UserError(f"store={options.store}: only together with sweep=<name>")
    if len(names) != 1:
        raise UserError("fit: name one CSV file, or sweep=<name>")
    return _read_csv(Path(names[0]).expanduser())


def _read_csv(file: Path) -> _Table:
    import pandas
    from pandas.errors import EmptyDataError, ParserError

    try:
        rows = pandas.read_csv(file, skip_blank_lines=False)
    except OSError as error:
        raise UserError(f"fit {file}: cannot be read: {error.strerror or error}") from None
    except (EmptyDataError, ParserError, UnicodeDecodeError) as error:
        raise UserError(f"fit {file}: is not a CSV file: {' '.join(str(error).split())}") from None
    places = [f"line {at + 2} of {file.name}" for at in range(len(rows))]
    table = _Table(rows, places, str(file), [])
    return table.chosen(rows.notna().any(axis=1).tolist())  # blank lines


def _read_sweep(name: str, store: Path) -> _Table:
    """The finished records of the sweep's newest plan. What is not finished or misses its level is left out, and
    the notes say so."""
    from pandas import DataFrame

    from sparsebench.results import query
    from sparsebench.results.store import Store
    from sparsebench.sweep.plan import newest

    plan = newest(store, name)
    if plan is None:
        raise UserError(f"sweep={name}: store={store} has no plan of that name; start it with: sweep {name}")
    planned = set(plan.ids())
    records = query.planned(Store(store), {run.run_id: run.point for run in plan.runs}).records
    finished = [record for record in records if record["status"] == "ok"]
    kept = [record for record in finished if not record.get("flagged")]
    notes = []
    if len(finished) < len(planned):
        notes.append(f"{len(planned) - len(finished)} of {len(planned)} planned runs of {name} are not finished")
    if len(kept) < len(finished):
        notes.append(f"{len(finished) - len(kept)} runs missed their sparsity and are left out")
    if not kept:
        raise UserError(f"sweep={name}: none of its {len(planned)} runs can be used: {'; '.join(notes)}")
    places = [f"run {record['run_id'][:8]} ({record.get('method')}, {record.get('task')})" for record in kept]
    return _Table(DataFrame(kept), places, f"sweep {name}", notes)


def _selected(table: _Table, given: Mapping[str, str], variables: set[str]) -> _Table:
    """The rows that ``<column>=<value>`` choose. UserError for a word that is no option, variable or column."""
    from sparsebench.results.view import select

    own = set(options_of(Options)) | variables
    filters = {key: value for key, value in given.items() if key not in own}
    columns = set(map(str, table.rows))
    for key in filters:
        if key not in columns:
            raise UserError(
                f"{key}: is no option of fit, no variable of the law and no column{closest(key, own | columns)}"
            )
    if not filters:
        return table
    records = [{**row, "__at": at} for at, row in enumerate(_plain(table.rows))]
    hits = {record["__at"] for record in select(records, filters)}
    if not hits:
        raise UserError(f"fit: no row of {table.source} has {' '.join(f'{k}={v}' for k, v in filters.items())}")
    return table.chosen([at in hits for at in range(len(records))])


def _plain(rows: DataFrame) -> list[dict[str, Any]]:
    """The rows as flat mappings, gaps as None."""
    return [
        {str(key): None if value != value else value for key, value in row.items()} for row in rows.to_dict("records")
    ]


def _candidates(
    laws: Sequence[Law], given: Mapping[str, str], options: Options, table: _Table
) -> list[tuple[str, Law, dict[str, str]]]:
    """(name, law, variable -> column) of every fit that is asked for: every law with every choice of its columns."""
    found: list[tuple[str, Law, dict[str, str]]] = []
    for law in laws:
        choices = {}
        for variable, meaning in law.variables.items():
            keys = [variable, *(alias for alias, target in law.aliases.items() if target == variable)]
            key = next((key for key in keys if key in given), None)
            if key is None:
                raise UserError(f"{variable}: law={law.name} needs {variable}=<column> ({meaning}){_columns(table)}")
            whole = given[key] in table.rows
            choices[variable] = [given[key]] if whole else [one.strip() for one in given[key].split(",")]
            for column in choices[variable]:
                _has(table, key, column)
        for columns in itertools.product(*choices.values()):
            mapping = dict(zip(choices, columns, strict=True))
            own = [f"{name}={mapping[name]}" for name in mapping if len(choices[name]) > 1]
            found.append((" ".join([law.name, *own]), law, mapping))
    _check_used(laws, given)
    for name in ("value", "group", "weights"):
        column = getattr(options, name)
        if column is not None:
            _has(table, name, column)
    return found


def _check_used(laws: Sequence[Law], given: Mapping[str, str]) -> None:
    """UserError when an alias and its variable are both given and no law takes the alias for its own."""
    for law in laws:
        for alias, target in law.aliases.items():
            others = any(alias in one.variables for one in laws)
            if alias in given and target in given and not others:
                raise UserError(f"{alias}: law={law.name} has {target} already, of which {alias} is another name")


def _has(table: _Table, key: str, column: str) -> None:
    if column not in table.rows:
        raise UserError(f"{key}={column}: no such column{_columns(table)}")


def _columns(table: _Table) -> str:
    return f"; columns: {', '.join(map(str, table.rows))}"


def _fitted(name: str, law: Law, columns: Mapping[str, str], left: Sequence[str], table: _Table, o: Options) -> Result:
    """One candidate, with and without the filter. ``left``: the columns whose highest values are left out."""
    from sparsebench.analysis.laws.estimate import fit
    from sparsebench.analysis.laws.result import Settings, analyse

    points = _points(law, columns, table, o)
    settings = Settings(o.loss, o.delta, o.keep, o.clip, o.bootstrap, o.seed, o.drop_highest)
    weights = _numbers(table, "weights", o.weights, law) if o.weights else None
    drop_by = {column: _numbers(table, "drop_by", column, None) for column in left}
    mask = _filter(o.only, table)
    if o.only and not mask.any():
        raise UserError(f"only={o.only}: leaves no row")
    result = analyse(
        points[mask], law, settings, name=name, weights=None if weights is None else weights[mask],
        drop_by={column: values[mask] for column, values in drop_by.items()}, progress=_progress(),
    )  # fmt: skip
    if o.only is None:
        return result
    without = fit(points, law, delta=o.delta, loss=o.loss, keep=o.keep, clip=o.clip, weights=weights)
    filtered = {
        "only": o.only,
        "excluded": int((~mask).sum()),
        "without": {"n": without.n, "parameters": without.params, "objective": without.objective},
    }
    return replace(result, extra={**result.extra, "filter": filtered}, excluded=points[~mask])


def _left(candidates: Sequence[tuple[str, Law, dict[str, str]]], table: _Table, options: Options) -> list[str]:
    """The columns whose highest values are left out, the same ones for every candidate."""
    given = [one.strip() for one in (options.drop_by or "").split(",") if one.strip()]
    for column in given:
        _has(table, "drop_by", column)
    own = [columns[name] for _, law, columns in candidates for name in law.numeric]
    return given or list(dict.fromkeys(own))


def _points(law: Law, columns: Mapping[str, str], table: _Table, options: Options) -> DataFrame:
    """The columns under the law's names, checked."""
    from pandas import DataFrame

    found: dict[str, Any] = {}
    for variable, column in columns.items():
        if variable in law.categories:
            found[variable] = _names(table, variable, column)
        else:
            found[variable] = _numbers(table, variable, column, law)
    found["value"] = _numbers(table, "value", options.value, law)
    if options.group:
        found["group"] = _names(table, "group", options.group)
    return DataFrame(found)


def _numbers(table: _Table, key: str, column: str, law: Law | None) -> Any:
    """The column as float64. UserError naming the first row that holds no number, or none that ``law`` takes."""
    import pandas

    from sparsebench.analysis.laws.estimate import first_wrong, needed

    cells = table.rows[column]
    numbers = pandas.to_numeric(cells, errors="coerce").to_numpy(dtype=float)
    gaps = numbers != numbers
    at = int(gaps.argmax()) if gaps.any() else (None if law is None else first_wrong(numbers, key, law))
    if at is not None:
        cell = cells.iloc[at]
        shown = "is empty" if cell != cell or cell is None else f"is {cell}"
        valid = "a number" if law is None else needed(key, law)
        raise UserError(f"{key}={column}: {table.places[at]} {shown}; must be {valid} in every row")
    return numbers


def _names(table: _Table, key: str, column: str) -> list[str]:
    cells = table.rows[column]
    if cells.isna().any():
        raise UserError(f"{key}={column}: {table.places[int(cells.isna().argmax())]} is empty; every row needs a name")
    return [str(cell) for cell in cells]


def _filter(only: str | None, table: _Table) -> Any:
    """The rows that meet every comparison of ``only``: (rows,) bool."""
    import numpy

    mask = numpy.ones(len(table.rows), dtype=bool)
    for part in only.split(",") if only else ():
        match = _ONLY.fullmatch(part)
        bound = _number(match["number"].strip(), "float") if match else None
        if match is None or not isinstance(bound, float):
            raise UserError(f"only={only}: written <column><comparison><number>, such as D>=1e8")
        _has(table, "only", match["column"])
        mask &= _COMPARISONS[match["sign"]](_numbers(table, "only", match["column"], None), bound)
    return mask


def _json(results: Sequence[Result], table: _Table, given: Mapping[str, str]) -> str:
    from sparsebench.analysis.laws.result import compared

    fits = [result.to_json() for result in results]
    for one in fits:
        one["warnings"] += table.notes
        one |= {"source": table.source, "options": dict(given)}
    found: dict[str, Any] = fits[0] if len(fits) == 1 else {"fits": fits, "comparison": compared(results)}
    return json.dumps(found, indent=1, allow_nan=False) + "\n"


def _progress() -> Callable[[str, int, int], None] | None:
    """A line on stderr while the resamples are fitted; None when that is not a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(what: str, done: int, total: int) -> None:
        end = "\r\033[K" if done == total else ""
        print(f"\r\033[K{what} {done}/{total}{end}", end="", file=sys.stderr, flush=True)

    return show
