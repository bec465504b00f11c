"""``kernel=``: milliseconds on sparse kernels in the record, and logits that agree with the masked model's."""

from __future__ import annotations

import pytest
from commands import Command

SMALL = ["model=tiny_100k", "task.windows=1", "task.context=64"]


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize(
    ("method", "layers"),
    [
        (["method=magnitude", "sparsity=0.7"], 14),
        (["method=magnitude", "pattern=2:4"], 14),
        (["method=teal", "sparsity=0.5", "calibration.nsamples=2", "calibration.seqlen=64"], 14),
        (["method=dense"], 0),
    ],
    ids=["bitmap", "2:4", "skipping", "dense"],
)
def test_a_record_holds_milliseconds_of_the_swapped_model(
    command: Command, method: list[str], layers: int, kernel: str
) -> None:
    assert command(*SMALL, *method).code == 0
    answer = command(*SMALL, *method, f"kernel={kernel}")
    assert answer.code == 0, answer.err
    plain, timed = sorted(answer.store.records(), key=lambda record: "ms_decode" in record)
    assert timed["perplexity"] == plain["perplexity"], "quality is the masked model's"
    assert plain["latency"] == "simulated" and "ms_decode" not in plain
    assert timed["latency"] == "measured"
    skips = "method=teal" in method and kernel == "reference"  # the reference multiplies the zeros
    assert timed["kernel_layers"] == (0 if skips else layers)
    assert timed["kernel_error"] < 1e-5 and timed["latency_verdict"] in ("ok", "noisy")
    assert bool(timed["kernel_formats"]) == bool(timed["kernel_layers"])
    for phase in ("prefill", "decode"):
        assert timed[f"ms_{phase}"] > 0 and timed[f"ms_{phase}_dense"] > 0 and timed[f"speedup_{phase}"] > 0
    assert "x dense" in answer.out


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        (["method=wina", "calibration.nsamples=2", "calibration.seqlen=64"], 14),  # on rotated weights
        (["method=cats", "calibration.nsamples=2", "calibration.seqlen=64"], 4),  # rows of up, columns of down
        (["method=statistical_topk"], 4),
        (["method=sirius", "task=generation", "task.items=2", "task.samples=2", "method.sirius.period=4"], 6),
    ],
    ids=["wina", "cats", "statistical_topk", "sirius"],
)
def test_what_gates_drop_is_skipped(command: Command, words: list[str], layers: int) -> None:
    small = SMALL if "task=generation" not in words else SMALL[:1]
    answer = command(*small, *words, "sparsity=0.5", "kernel=auto")
    assert answer.code == 0, answer.err
    (record,) = answer.store.records()
    assert record["latency"] == "measured" and record["kernel_layers"] == layers
    assert record["kernel_error"] < 1e-5 and record["ms_decode"] > 0
    assert record["bytes_decode"] < record["bytes_decode_dense"]


@pytest.mark.parametrize(("gates", "least", "most"), [("teal", 0.75, 0.8), ("cats", 0.8, 0.85)])
def test_a_stack_of_sparse_weights_and_activations(command: Command, gates: str, least: float, most: float) -> None:
    """Bitmaps whose zero inputs are skipped, and bitmaps for layers that no gate acts on; only where rows of outputs
    are skipped weights stay dense."""
    stack = [f"method=[magnitude,{gates}]", "calibration.nsamples=2", "calibration.seqlen=64", "sparsity=0.5"]
    answer = command(*SMALL, *stack, "kernel=auto")
    assert answer.code == 0, answer.err
    (record,) = answer.store.records()
    assert (record["latency"], record["kernel_layers"]) == ("measured", 14) and record["kernel_error"] < 1e-5
    assert least < record["bytes_resident"] / record["bytes_weights_dense"] < most


def test_attention_that_no_kernel_runs_is_told(command: Command) -> None:
    answer = command(*SMALL, "method=local_sink", "sparsity=0.3", "kernel=auto")
    assert answer.code == 0, answer.err
    (record,) = answer.store.records()
    assert record["latency"] == "measured, but attention by the reference"
    assert "attention by the reference: what is computed is no set of blocks" in record["warnings"]


def test_blocks_of_attention_run_on_a_kernel(command: Command) -> None:
    prompt = ["model=tiny_100k", "task=sf_niah", "task.length=256", "task.samples=2"]
    blocks = ["method=block_sparse", "method.block_sparse.chunk_size=64", "method.block_sparse.top_chunks=3"]
    answer = command(*prompt, *blocks, "kernel=auto")
    assert answer.code == 0, answer.err
    (record,) = answer.store.records()
    assert record["latency"] == "measured, but attention while decoding by the reference"
    assert (record["kernel_layers"], record["warnings"]) == (2, None)
    assert record["kernel_error"] < 1e-5 and record["ms_prefill"] > 0


def test_a_wrong_kernel_is_a_mistake(command: Command) -> None:
    answer = command(*SMALL, "kernel=fast")
    assert answer.code == 2 and "kernel=fast" in answer.err
