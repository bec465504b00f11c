"""Activation sparsity over training: small ReLU and SiLU models, and PPL-p% sparsity at their checkpoints.

``python -m sparsebench.models.emergence [relu|silu ...] [folder=build/emergence] [width=64] ...`` trains one model for
each activation function (the ladder's architecture and data), resuming where an earlier call stopped, keeps its
checkpoints, and measures them as Luo et al. 2024 (arXiv 2411.02335, "Sparsing Law") do: one cett per run, searched on
its last checkpoints together, gives the activation ratio of every checkpoint and layer. The result is
``<folder>/emergence.csv``; the last lines are the commands that fit the paper's laws to it. ``ship`` copies it to
``reports/measured/sparsing_law.csv``; ``page > docs/sparsing_law.md`` compares the laws fitted to that with Table 2.

Differences from the study: AdamW without muP, grouped keys and values, two corpora of this project, and sizes.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsebench.config import parse_values
from sparsebench.declare import Declared, option, options_of
from sparsebench.errors import UserError, closest
from sparsebench.methods.activations.cett import Probe, common_cett
from sparsebench.models import ladder
from sparsebench.models.embedded import HOME
from sparsebench.paths import data_folder
from sparsebench.trainer import Hook, Source, TrainConfig, Trainer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

LAWS = {"relu": "decreasing_logspace", "silu": "increasing_convergent"}  # of sec. 4, by activation function
MEASURED = Path("measured", "sparsing_law.csv")  # under reports/
_LABELS = {"relu": "ReLU", "silu": "SiLU"}
_BOOTSTRAP = 200  # resamples for the page's intervals
_TOL = 1e-6
_PLACE = ("activation", "width", "layers")  # columns that tell runs apart
_WINDOW = 128  # tokens of a sequence, in training and validation

Row = dict[str, Any]


@dataclass(frozen=True)
class Options(Declared):
    """What ``key=value`` can set."""

    folder: str = option("build/emergence", "where models, checkpoints and the table go")
    width: int = option(48, "hidden size, a multiple of 8; the MLP is 2.5 times as wide", low=8, high=4096)
    layers: int = option(2, "decoder blocks", low=1, high=64)
    steps: int = option(2000, "training steps", low=1)
    batch_tokens: int = option(2048, "training tokens of a step", low=256, unit="tokens")
    checkpoints: int = option(20, "equally spaced checkpoints that are kept", low=1, high=1000)
    p: float = option(0.01, "relative rise of the perplexity", above=0.0, below=1.0)
    stabilise_last: int = option(5, "checkpoints at the end on which cett is searched together", low=1)
    warmup_drop: int = option(1, "checkpoints at the start that are not measured", low=0)
    windows: int = option(32, "validation sequences of 128 tokens", low=1, high=500)
    lr: float = option(4e-3, "highest learning rate", above=0.0)
    seed: int = option(0, "of the training data", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 8:
            raise UserError(f"width={self.width}: must be a multiple of 8")
        if not self.warmup_drop < self.checkpoints <= self.steps:
            raise UserError(f"checkpoints={self.checkpoints}: must be above warmup_drop and at most steps")

    def kept(self) -> list[int]:
        """The steps after which a checkpoint is kept."""
        return [round(self.steps * at / self.checkpoints) for at in range(1, self.checkpoints + 1)]

    def place(self, activation: str) -> Path:
        """The folder of one model."""
        return Path(self.folder).expanduser() / f"{activation}-{self.width}x{self.layers}"


def build(options: Options, activation: str, vocabulary: int) -> LlamaForCausalLM:
    """An untrained model of the ladder's kind with this activation function."""
    from transformers.activations import ACT2FN

    rung = ladder.Rung(options.width, options.layers, 4, options.width * 5 // 2, options.steps, options.lr, 0.0)
    model = ladder.build(rung, vocabulary)
    model.config.hidden_act = activation
    for block in model.model.layers:
        block.mlp.act_fn = ACT2FN[activation]
    return model


class Keeper(Hook):
    """Keeps the weights after the wanted steps, with the training tokens seen by then."""

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        self.folder, self.steps = folder, set(steps)

    def after_step(self, trainer: Trainer) -> None:
        step = trainer.step + 1  # counted once the hooks have run
        if step in self.steps:
            state = {"tokens": trainer.tokens, "model": trainer.model.state_dict()}
            temporary = self.folder / "kept.tmp"
            torch.save(state, temporary)
            temporary.replace(checkpoint(self.folder, step))


def checkpoint(folder: Path, step: int) -> Path:
    """The file of the weights after a step."""
    return folder / f"step-{step:07d}.pt"


def train(activation: str, options: Options, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Trains, or resumes, one model; writes checkpoints and a Hugging Face folder ``hf`` beside them."""
    folder = options.place(activation)
    every = max(1, options.steps // options.checkpoints)
    config = TrainConfig(
        steps=options.steps, batch_tokens=options.batch_tokens, lengths=((1.0, _WINDOW),), lr=options.lr,
        decay=0.1, seed=options.seed, checkpoint_every=every, log_every=every,
    )  # fmt: skip
    sources: dict[str, tuple[Source, float]] = {
        "kjv": (ladder.KjvSource(tokenizer), 0.5),
        "tinyworld": (ladder.TinyworldSource(tokenizer), 0.5),
    }
    model = build(options, activation, len(tokenizer))
    try:
        Trainer(model, sources, config, folder, hooks=[Keeper(folder, options.kept())]).fit()
    except ValueError as error:  # a checkpoint of other settings lies there
        raise UserError(f"folder={options.folder}: {error}") from None
    model.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    return model


def measure(activation: str, options: Options, model: LlamaForCausalLM, windows: Tensor) -> list[Row]:
    """A row for each checkpoint behind the warm-up: tokens, the run's cett, perplexity, activation ratios."""
    folder = options.place(activation)
    steps = options.kept()[options.warmup_drop :]

    def probe(step: int) -> tuple[Probe, int]:
        state = torch.load(checkpoint(folder, step), map_location="cpu", weights_only=True)
        other = build(options, activation, model.config.vocab_size)
        other.load_state_dict(state["model"])
        return Probe(other.eval(), windows), state["tokens"]

    cett = common_cett([probe(step)[0] for step in steps[-options.stabilise_last :]], options.p, _TOL)
    rows: list[Row] = []
    for step in steps:
        one, tokens = probe(step)
        reached = one.run(one.gates(cett))
        row: Row = {"activation": activation, "width": options.width, "layers": options.layers, "step": step}
        row |= {"tokens": tokens, "tokens_1e9": tokens / 1e9, "p": options.p, "cett": cett, "loss": one.loss}
        row |= {"ppl_ratio": reached.ratio, "ratio": reached.mean}
        rows.append(row | {f"ratio_layer_{at}": ratio for at, ratio in enumerate(reached.activation)})
        _say(f"{activation} step {step}: activation ratio {reached.mean:.4f}, perplexity ratio {reached.ratio:.4f}")
    return rows


def write(file: Path, rows: Sequence[Row]) -> None:
    """Adds the rows to the table, in place of those of the same runs."""
    made = {tuple(str(row[key]) for key in _PLACE) for row in rows}
    before = [row for row in read(file) if tuple(row[key] for key in _PLACE) not in made] if file.exists() else []
    names = list(dict.fromkeys(name for row in [*before, *rows] for name in row))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, names, lineterminator="\n")
        table.writeheader()
        for row in [*before, *rows]:
            table.writerow({key: f"{value:.7g}" if isinstance(value, float) else value for key, value in row.items()})


def read(file: Path) -> list[Row]:
    """The rows of such a table, as texts. UserError when there is none."""
    try:
        with file.open(newline="", encoding="utf-8") as table:
            return list(csv.DictReader(table))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); train first, or name folder=") from None


def fit_words(row: Row) -> dict[str, str]:
    """What the verb ``fit`` takes for the run that this row is of."""
    words = {"law": LAWS[row["activation"]], "D": "tokens_1e9", "value": "ratio"}
    return words | {key: str(row[key]) for key in _PLACE}


def fit_command(file: str, row: Row) -> str:
    """The command that fits the run that this row is of."""
    return " ".join(["python -m sparsebench fit", file, *(f"{key}={value}" for key, value in fit_words(row).items())])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options(words: Sequence[str]) -> Options:
    valid, found = options_of(Options), {}
    for key, values in parse_values(words).items():
        if key not in valid:
            raise UserError(f"{key}: unknown option of emergence{closest(key, valid)}")
        if len(values) != 1:
            raise UserError(f"{key}: takes one value")
        found[key] = valid[key].check(key, values[0])
    return Options(**found)


def run(names: Sequence[str], options: Options) -> str:
    """Trains and measures the named models; returns the commands that fit them, one a line."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(HOME / "tokenizer")
    stream = ladder.encode_kjv(tokenizer, "validation")[: options.windows * _WINDOW]
    file = Path(options.folder).expanduser() / "emergence.csv"
    commands = []
    for name in names:
        rows = measure(name, options, train(name, options, tokenizer), stream.view(-1, _WINDOW))
        write(file, rows)
        commands.append(fit_command(str(file), rows[0]))
    return "\n".join(commands)


def ship(options: Options) -> Path:
    """Copies the table into the package; returns where it is."""
    source, target = Path(options.folder).expanduser() / "emergence.csv", data_folder("reports") / MEASURED
    read(source)
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(source, target)
    return target


_PAGE = """# Sparsing Law: activation sparsity over training

How many neurons of a gated MLP a token uses, over training, in small ReLU and SiLU models of this project, beside
what Luo et al. 2024 (arXiv 2411.02335) published for 0.1B to 2.4B. Made by
`python -m sparsebench.models.emergence page` from `reports/measured/sparsing_law.csv`, which
`python -m sparsebench.models.emergence` makes in minutes on one core, and `ship` puts there.

The activation ratio is that of PPL-{percent}% sparsity, on held-out text: each layer has a threshold on its neurons'
outputs, all at one relative error (cett), found on a run's last checkpoints together, at which the perplexity is
{percent}% above the dense one. On so little text the perplexity is a step function of the thresholds; single
checkpoints scatter around {percent}%.

## Measured

{measured}

Models are named by activation function, width and number of layers. The table has all checkpoints, and ratios by layer.
{sizes}

## The paper's laws, fitted to them

{fitted}

D is in 1e9 tokens, as in the paper; intervals at 95% from {bootstrap} resamples of:

```bash
{commands}
```

## Published, Table 2

{published}

Compare limits and curves, not coefficients: ours are models about {smaller:,.0f} times smaller than the smallest of
these, on other text, and trained on millions of tokens, not billions.
"""


_ONE_SIZE = """One size and one seed were trained, so that nothing here says how ratios move with scale; `width=` and
`layers=` train other sizes into the same table."""
_SIZES = "One seed was trained of each."


def page(file: Path) -> str:
    """The comparison as Markdown, from a table of this command and the published coefficients."""
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in read(file):
        runs.setdefault(tuple(row[key] for key in _PLACE), []).append(row)
    published = _published()
    smallest = min(float(name.split()[1].removesuffix("B")) for name in published) * 1e9
    firsts = [rows[0] for rows in runs.values()]
    return _PAGE.format(
        percent=f"{100 * float(firsts[0]['p']):g}",
        sizes=_SIZES if len({(row["width"], row["layers"]) for row in firsts}) > 1 else _ONE_SIZE,
        measured=_table(
            ["model", "checkpoints", "tokens / 1e6", "ratio, first", "ratio, last", "lowest", "highest", "cett",
             "last, by layer"],
            [_measured(rows) for rows in runs.values()],
        ),
        fitted=_table(["model", "law", "A0", "alpha", "b", "c", "R2"], [_fit(file, row) for row in firsts]),
        commands="\n".join(fit_command(f"reports/{MEASURED.as_posix()}", row) for row in firsts),
        bootstrap=_BOOTSTRAP,
        published=_table(["model", "A0", "alpha", "b", "c"], [
            [name, *(found.get(key, "-") for key in ("A0", "alpha", "b", "c"))] for name, found in published.items()
        ]),
        smaller=round(smallest / max(map(_parameters, firsts)), -2),
    )  # fmt: skip


def _name(row: Row) -> str:
    return f"{_LABELS[row['activation']]} {row['width']}x{row['layers']}"


def _parameters(row: Row) -> float:
    """Parameters of the blocks, about: attention with grouped keys and values, and an MLP 2.5 times as wide."""
    width = int(row["width"])
    return int(row["layers"]) * width * width * (3 + 3 * 2.5)


def _measured(rows: Sequence[Row]) -> list[str]:
    ratios = [float(row["ratio"]) for row in rows]
    tokens = [float(row["tokens"]) / 1e6 for row in rows]
    values = [f"{one:.4f}" for one in (ratios[0], ratios[-1], min(ratios), max(ratios), float(rows[0]["cett"]))]
    layers = [f"{float(rows[-1][f'ratio_layer_{at}']):.4f}" for at in range(int(rows[0]["layers"]))]
    return [_name(rows[0]), str(len(rows)), f"{tokens[0]:.2f} to {tokens[-1]:.2f}", *values, ", ".join(layers)]


def _fit(file: Path, row: Row) -> list[str]:
    from sparsebench.analysis.fit_command import run as fit

    given = {**fit_words(row), "bootstrap": str(_BOOTSTRAP), "format": "json"}
    found = json.loads(fit([str(file)], given, file.parent))

    def cell(name: str) -> str:
        if name not in found["parameters"]:
            return "-"
        low, high = found["ci"][name]
        if name != "A0" and not found["identifiable"]:
            return "not determined"
        return f"{found['parameters'][name]:.3g} [{low:.3g}, {high:.3g}]"

    cells = [cell(name) for name in ("A0", "alpha", "b", "c")]
    return [_name(row), f"`{found['formula']}`", *cells, f"{found['quality']['r2']:.2f}"]


def _published() -> dict[str, dict[str, str]]:
    """Model -> coefficient -> value of Table 2."""
    found: dict[str, dict[str, str]] = {}
    for row in read(data_folder("reports") / "published" / "sparsing_law.csv"):
        if row["metric"].startswith("law "):
            found.setdefault(row["model"], {})[row["metric"].removeprefix("law ")] = row["value"]
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(one) + " |" for one in (head, ["---"] * len(head), *rows))


def main(arguments: Sequence[str]) -> int:
    """0 done, 2 bad input."""
    names = [word for word in arguments if "=" not in word]
    try:
        options = _options([word for word in arguments if "=" in word])
        for name in names:
            if name not in LAWS and names not in (["ship"], ["page"]):
                raise UserError(f"emergence {name}: not an activation function here{closest(name, LAWS)}")
        if names == ["ship"]:
            print(ship(options))
        elif names == ["page"]:
            print(page(data_folder("reports") / MEASURED), end="")
        else:
            print(run(names or list(LAWS), options))
    except UserError as error:
        _say(f"sparsebench: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
