"""The command line: ``python -m sparsebench [verb] [names] [key=value ...]``.

The verb is read here, everything behind it by its own function; what a run is, is decided in
``config``. Results go to stdout, progress and messages to stderr.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebench import __version__
from sparsebench.errors import Mistakes, UserError, closest
from sparsebench.run import store_folder

if TYPE_CHECKING:
    from sparsebench.run import Run

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 3

HELP = """\
sparsebench {version}: how much quality is lost, how much cost is saved, when a model is made sparse

  python -m sparsebench [run] [key=value ...]       one run, for example
                        method=wanda sparsity=0.5     prune the embedded model, evaluate it on real text
                        method=magnitude pattern=2:4 model=tiny_1m model.outliers=true
                        method=wanda model=llama2_7b task=perplexity task.corpus=wikitext2
  python -m sparsebench -m key=a,b key=0.3,0.5      a grid: every combination
  python -m sparsebench results [column=value ...]  what is in the store (format=table|csv|json|parquet);
                                                    `results compact` makes a large store answer faster
  python -m sparsebench sweep <name> [key=a,b ...]  a whole grid from sweeps/, resumable (cluster=local|inline|slurm,
                                                    retry=failed, --plan shows it, --detach leaves it running)
  python -m sparsebench status|cancel <sweep>       how far it is; end its workers
  python -m sparsebench track <sweep>               mirror its records to W&B (also: tracking=wandb on run and sweep)
  python -m sparsebench logs <run id>               error, traceback and worker log of a run
  python -m sparsebench report <sweep>              a page and a notebook: curves, claims, costs, published numbers
  python -m sparsebench claims [paper]              what papers claim, tested on the store: verdicts and why
  python -m sparsebench fit <csv> law=<name> N=<column> D=<column> value=<column>
                                                    a scaling law with its intervals (also: fit sweep=<name>)
  python -m sparsebench list [methods|models|tasks|corpora|sweeps]
  python -m sparsebench show <name>                 every option of a method, task, model, corpus, or `run`
  python -m sparsebench bench <name> [key=value ..] measures speed side by side (`bench` alone lists what)
  python -m sparsebench export <folder> to=<new>    a pruned model compressed, or a compressed one plain again
  python -m sparsebench doctor                      versions, devices, what is available and why not

  -m            several values per key make a grid
  -v            more messages (tracebacks of failed runs)
  --config-dir  a folder of your own YAML and plug-ins (sparsebench.yaml: plugins: [my_method.py])
  -h            this text

Exit codes: 0 done, 1 some runs failed (listed), 2 bad input and nothing started, 3 interrupted.
"""


@dataclass
class Arguments:
    """The command line, taken apart but not yet understood."""

    verb: str = "run"
    names: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    grid: bool = False
    verbose: bool = False
    help: bool = False
    config_dir: Path | None = None
    plan: bool = False
    detach: bool = False


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit code."""
    try:
        arguments = parse(argv)
        if arguments.help:
            print(HELP.format(version=__version__), end="")
            return DONE
        return VERBS[arguments.verb](arguments)
    except UserError as error:
        lines = str(error).split("\n") if isinstance(error, Mistakes) else [str(error)]
        print("\n".join(_line(line) for line in [f"sparsebench: {lines[0]}", *lines[1:]]), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("sparsebench: interrupted; what was finished is in the store, the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):  # of a path that some option named
            raise
        print(_line(f"sparsebench: {error.filename}: {error.strerror}"), file=sys.stderr)
        return BAD_INPUT


def _line(text: str) -> str:
    """The text on one line, whatever the words in it were: no line breaks, no terminal controls."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def parse(argv: Sequence[str]) -> Arguments:
    """Splits the words into verb, names, overrides and flags. UserError for an unknown verb or flag."""
    arguments = Arguments()
    words = list(argv)
    first = True
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            arguments.help = True
        elif word == "-m":
            arguments.grid = True
        elif word == "-v":
            arguments.verbose = True
        elif word == "--plan":
            arguments.plan = True
        elif word == "--detach":
            arguments.detach = True
        elif word == "--config-dir" or word.startswith("--config-dir="):
            value = word.partition("=")[2] or (words.pop(0) if words else "")
            if not value:
                raise UserError("--config-dir needs a folder")
            arguments.config_dir = Path(value)
        elif word.startswith("-"):
            raise UserError(
                f"{word}: unknown flag; valid: -h -m -v --config-dir --plan --detach; options are written key=value"
            )
        elif "=" in word:
            arguments.overrides.append(word)
        elif first:
            if word not in VERBS:
                raise UserError(f"{word}: unknown verb{closest(word, VERBS)}")
            arguments.verb, first = word, False
        else:
            arguments.names.append(word)
    return arguments


def _run(arguments: Arguments) -> int:
    from sparsebench import config
    from sparsebench.experiment import Experiment
    from sparsebench.results import view
    from sparsebench.results.store import Store
    from sparsebench.results.tracking import TRACKING, mirror
    from sparsebench.terminal import Reporter, summary

    if arguments.names:
        raise UserError(
            f"{arguments.names[0]}: an option is written key=value, for example method={arguments.names[0]}"
        )
    workspace = config.Workspace(arguments.config_dir)
    tracking = [word for word in arguments.overrides if TRACKING.owns(word)]
    words = [word for word in arguments.overrides if not TRACKING.owns(word)]
    runs = config.runs(workspace, words, sweep=arguments.grid)
    _check_shared(runs)
    options = runs[0].options
    store = Store(store_folder(options.store))
    store.check_writable()
    mirrored = mirror(tracking, store, None, workspace.config_dir)
    records: list[dict[str, Any]] = []
    with Reporter(len(runs)) as reporter:
        experiment = Experiment(workspace, store, reporter.progress)
        if len(runs) > 1:
            experiment.check(runs)
        for run in _shared_first(runs):
            reporter.start(f"{run.label} {run.model.label} {run.task.label}")
            record = experiment.run(run)
            records.append(record)
            if mirrored is not None:
                mirrored.push(record)
            if record["status"] != "ok":
                reporter.say(f"{record['run_id'][:8]} {run.label}: {record['status']}: {record['error']}")
                if arguments.verbose:
                    reporter.say(
                        "".join(row["error"] for row in store.details("errors", record["run_id"], record["attempt"]))
                    )
    sizes = "".join(f"saved in {place[0]}\n{one.text()}" for place, one in experiment.saved.items() if one)
    records = list({record["run_id"]: record for record in records}.values())  # a grid can name one run twice
    _print(view.table(records, format=options.format))
    if options.format == "table" and len(records) == 1:
        print(summary(records[0], store.folder))
    print(sizes, end="", file=sys.stdout if options.format == "table" else sys.stderr)
    if mirrored is not None and mirrored.told():
        print(mirrored.told(), file=sys.stderr)
    return DONE if all(record["status"] == "ok" for record in records) else FAILED


def _check_shared(runs: Sequence[Run]) -> None:
    """UserError when the runs differ in what a command has once, or would save several models to one folder."""
    for key in ("store", "format"):
        values = dict.fromkeys(str(getattr(run.options, key)) for run in runs)
        if len(values) > 1:
            raise UserError(f"{key}={','.join(values)}: one value for all runs of a grid")
    saved: dict[str, str] = {}
    for run in runs:
        what = f"{_sparse_model(run)} {run.options.save_as}"
        if run.options.save and saved.setdefault(run.options.save, what) != what:
            raise UserError(
                f"save={run.options.save}: one folder cannot hold the models of several runs; save one at a time"
            )


def _sparse_model(run: Run) -> str:
    """What is the same for the runs of one sparse model."""
    return str((run.methods, run.model, run.calibration, run.seed))


def _shared_first(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of one sparse model next to each other (it is made once), else in order."""
    places: dict[str, int] = {}
    keys = [_sparse_model(run) for run in runs]
    for key in keys:
        places.setdefault(key, len(places))
    return [run for _, run in sorted(zip(keys, runs, strict=True), key=lambda pair: places[pair[0]])]


def _sweep(arguments: Arguments) -> int:
    from sparsebench.config import Workspace
    from sparsebench.sweep import command

    name = _one_name(arguments, "a sweep (see `list sweeps`)")
    workspace = Workspace(arguments.config_dir)
    if arguments.detach:
        words = ["sweep", name, *arguments.overrides]
        words += ["--config-dir", str(arguments.config_dir)] if arguments.config_dir else []
        store = command.Request.of(arguments.overrides, store_folder(None), workspace.config_dir).store
        code = command.run(workspace, name, arguments.overrides, store_folder(None), only_plan=True)
        return code or command.detach(words, name, store)
    return command.run(workspace, name, arguments.overrides, store_folder(None), only_plan=arguments.plan)


def _track(arguments: Arguments) -> int:
    from sparsebench.results.tracking import TRACKING
    from sparsebench.sweep import command

    name = _one_name(arguments, "a sweep")
    own = [word for word in arguments.overrides if TRACKING.owns(word)]
    rest = dict(word.split("=", 1) for word in arguments.overrides if not TRACKING.owns(word))
    store = store_folder(rest.pop("store", None))
    if rest:
        raise UserError(f"track: takes store=<folder> and tracking.*, not {' '.join(rest)}")
    return command.track(name, own, store, arguments.config_dir)


def _on_store(arguments: Arguments) -> int:
    """The verbs that take a name and a store: status, cancel, logs."""
    from sparsebench.sweep import command

    name = _one_name(arguments, "a run id" if arguments.verb == "logs" else "a sweep")
    words = _settings(arguments)
    store = store_folder(words.pop("store", None))
    if words:
        raise UserError(f"{arguments.verb}: takes only store=<folder>, not {' '.join(arguments.overrides)}")
    verbs = {"status": command.status, "cancel": command.cancel, "logs": command.logs}
    return verbs[arguments.verb](name, store)


def _one_name(arguments: Arguments, what: str) -> str:
    if len(arguments.names) != 1:
        raise UserError(f"{arguments.verb}: name {what}, one at a time")
    return arguments.names[0]


def _results(arguments: Arguments) -> int:
    from sparsebench.results import query, view
    from sparsebench.results.store import Store

    words = _settings(arguments)
    format = words.pop("format", "table")
    folder = store_folder(words.pop("store", None))
    if arguments.names not in ([], ["compact"]):
        raise UserError(f"results {' '.join(arguments.names)}: a filter is written column=value; or: results compact")
    if not folder.is_dir():
        raise UserError(f"store={folder}: there is no store yet; run something first, or name another folder")
    if arguments.names:
        if words:
            raise UserError(f"results compact: takes only store=<folder>, not {' '.join(arguments.overrides)}")
        file, count = query.compact(Store(folder))
        print(f"{count} records in {file}")
        return DONE
    found = query.records(Store(folder), words)
    _print(view.table(found.records, format=format))
    if found.torn:
        print(f"sparsebench: {found.torn} torn lines were skipped", file=sys.stderr)
    return DONE


def _report(arguments: Arguments) -> int:
    from sparsebench.config import Workspace
    from sparsebench.reports import command

    _print(command.run(arguments.names, _settings(arguments), store_folder(None), Workspace(arguments.config_dir)))
    return DONE


def _claims(arguments: Arguments) -> int:
    from sparsebench.analysis import claims_command
    from sparsebench.config import Workspace

    workspace = Workspace(arguments.config_dir)
    _print(claims_command.run(arguments.names, _settings(arguments), store_folder(None), workspace))
    return DONE


def _fit(arguments: Arguments) -> int:
    from sparsebench.analysis import fit_command

    _print(fit_command.run(arguments.names, _settings(arguments), store_folder(None)))
    return DONE


def _list(arguments: Arguments) -> int:
    from sparsebench import terminal
    from sparsebench.config import Workspace

    format = _only_format(arguments)
    rows = terminal.listing(Workspace(arguments.config_dir), arguments.names)
    _print(terminal.listing_text(rows, format))
    return DONE


def _show(arguments: Arguments) -> int:
    from sparsebench import terminal
    from sparsebench.config import Workspace

    format = _only_format(arguments)
    if not arguments.names:
        raise UserError("show: name a method, task, model or corpus, or `run` for the options of every run")
    for name in arguments.names:
        _print(terminal.shown(Workspace(arguments.config_dir), name, format))
    return DONE


def _doctor(arguments: Arguments) -> int:
    from sparsebench import doctor

    _print(doctor.report(store_folder(None), _only_format(arguments)))
    return DONE


def _bench(arguments: Arguments) -> int:
    from sparsebench.bench import command

    _print(command.run(arguments.names, _settings(arguments)))
    return DONE


def _export(arguments: Arguments) -> int:
    from sparsebench.models import export_command

    _print(export_command.run(arguments.names, _settings(arguments)))
    return DONE


def _only_format(arguments: Arguments) -> str:
    words = _settings(arguments)
    format = words.pop("format", "table")
    if words or format not in ("table", "json"):
        raise UserError(f"{arguments.verb}: takes format=table or format=json, not {' '.join(arguments.overrides)}")
    return format


def _settings(arguments: Arguments) -> dict[str, str]:
    """The key=value words of verbs that take no overrides. UserError for a key that comes twice."""
    found: dict[str, str] = {}
    for word in arguments.overrides:
        key, _, value = word.partition("=")
        if key in found:
            raise UserError(f"{key}={value}: given twice ({key}={found[key]}); give it once")
        found[key] = value
    return found


def _print(output: str | bytes) -> None:
    if isinstance(output, bytes):
        sys.stdout.buffer.write(output)
    else:
        sys.stdout.write(output)


VERBS: dict[str, Callable[[Arguments], int]] = {
    "run": _run,
    "sweep": _sweep,
    "status": _on_store,
    "cancel": _on_store,
    "logs": _on_store,
    "track": _track,
    "results": _results,
    "report": _report,
    "claims": _claims,
    "fit": _fit,
    "list": _list,
    "show": _show,
    "bench": _bench,
    "export": _export,
    "doctor": _doctor,
}
