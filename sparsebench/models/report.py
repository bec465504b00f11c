"""``python -m sparsebench.models.report``: the page of the embedded models from their training logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsebench.corpora import tinyworld
from sparsebench.models.embedded import HOME
from sparsebench.models.ladder import OTHER_TOKENS, RUNGS, TASK_SHARES

_HEAD = """\
# The tiny ladder

Llama-architecture models (RoPE, RMSNorm, SwiGLU, grouped-query attention with 2 key/value heads, tied
embeddings, context 1024) trained by this project on two corpora, in Hugging Face format, stored in bfloat16
and run in float32.
This page is made by `python -m sparsebench.models.report` from the training logs beside the weights.

Train them again with `make ladder` (hours on one core; stop and start it as you like), then copy the
finished ones here with `python -m sparsebench.models.ladder ship`.
"""


def logged(name: str) -> list[dict[str, Any]]:
    """The evaluations of one rung's training, in order."""
    lines = (HOME / name / "training.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def page() -> str:
    """The page: shapes, recipe, final held-out numbers, curves."""
    shipped = [name for name in RUNGS if (HOME / name / "training.jsonl").exists()]
    finals = {name: logged(name)[-1] for name in shipped}
    lines = [_HEAD, "## Shapes and training", ""]
    lines += [
        "| model | hidden | layers | heads | MLP | steps | tokens | AdamW | Muon | length by share of steps |",
        "|---|" + "---|" * 9,
    ]
    for name in shipped:
        rung, tokens = RUNGS[name], finals[name]["tokens"]
        shape = f"{rung.hidden} | {rung.layers} | {rung.heads} | {rung.intermediate}"
        lengths = ", ".join(f"{length} until {share:.0%}" for share, length in rung.lengths)
        rates = f"{rung.lr:g} | {rung.muon_lr:g}"
        steps = f"{rung.steps}, grown from {rung.grown_from}" if rung.grown_from else str(rung.steps)
        lines.append(f"| {name} | {shape} | {steps} | {tokens / 1e6:.1f}M | {rates} | {lengths} |")
    lines += ["", "## Recipe", "", _recipe(), "", "## Held-out results", ""]
    keys = ["kjv/bits_per_byte", *(f"tinyworld/{task}" for task in tinyworld.TASKS)]
    lines += ["| | " + " | ".join(shipped) + " |", "|---|" + "---|" * len(shipped)]
    for key in keys:
        lines.append(f"| {key} | " + " | ".join(f"{finals[name][key]:.3f}" for name in shipped) + " |")
    lines += [
        "",
        "kjv: bits per byte on 64 validation windows of 512 tokens. tinyworld: share of answers that are exactly "
        "right, 48 documents of 512 tokens per task, before the weights were stored in bfloat16.",
        "",
        "![held-out curves](curves.png)",
    ]
    return "\n".join(lines) + "\n"


def _recipe() -> str:
    shares = ", ".join(f"{task} {share}" for task, share in TASK_SHARES.items())
    return (
        "One tokenizer for both corpora: byte-level BPE, 1,024 entries, digits split, every tinyworld word one token "
        "(`sparsebench/models/tokenizer.py`). One trainer (`sparsebench/trainer.py`): each step 8,192 tokens, 45% kjv "
        "(windows at random places of the training chapters) and 55% tinyworld (rows packed with documents of every "
        f"length that fits; percent of documents: {shares}). A tinyworld token that is not part of an answer weighs "
        f"{OTHER_TOKENS:g}. Sequence length rises with the steps (table above). Muon for the blocks' matrices, "
        "AdamW for the rest, weight decay 0.1, 2% warm-up, the last 40% of the steps decaying linearly to zero, "
        "gradients clipped at 1, "
        "forward in bfloat16 (float32 for tiny_4m). A grown model starts as the same function as the model of half its "
        "width (`sparsebench/models/growing.py`) and goes on from there: from nothing it had found no retrieval after "
        "500 steps. Many questions per training document and long copies are what makes induction "
        "heads appear early."
    )


def draw(file: Path) -> None:
    """Bits per byte and retrieval accuracy over training tokens, one line per rung."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shipped = [name for name in RUNGS if (HOME / name / "training.jsonl").exists()]
    figure, axes = pyplot.subplots(1, 2, figsize=(8.2, 3.2), layout="constrained")
    for name, colour in zip(shipped, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False):
        log = logged(name)
        tokens = [entry["tokens"] / 1e6 for entry in log]
        axes[0].plot(tokens, [entry["kjv/bits_per_byte"] for entry in log], color=colour, label=name, marker=".")
        key = "tinyworld/retrieval_multi_key"
        axes[1].plot(tokens, [entry[key] for entry in log], color=colour, label=name, marker=".")
    axes[0].set(xlabel="training tokens (millions)", ylabel="bits per byte, held-out kjv")
    axes[1].set(xlabel="training tokens (millions)", ylabel="multi-key retrieval at 512 tokens", ylim=(0, 1.02))
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main() -> None:
    (HOME / "README.md").write_text(page(), encoding="utf-8")
    draw(HOME / "curves.png")


if __name__ == "__main__":
    main()
