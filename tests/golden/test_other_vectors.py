"""The golden tests read whatever a folder holds: other shapes, cases, sparsities and patterns; they
refuse a folder that holds nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SETTINGS = ("s0.3", "s0.85", "1of3", "5of6")


def run_golden(folder, *options):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rA", *options]
    files = [str(HERE / f"test_{slug}_golden.py") for slug in ("magnitude", "wanda")]
    environment = {**os.environ, "SPARSEBENCH_GOLDEN_DIR": str(folder)}
    return subprocess.run([*command, *files], env=environment, cwd=HERE.parent.parent, capture_output=True, text=True)


def smallest(scores, setting, whole_matrix):
    """The rules in plain loops over (out, in) scores; True = pruned."""
    pruned = np.zeros(scores.shape, dtype=bool)
    if setting.startswith("s"):
        level = float(setting[1:])
        if whole_matrix:
            return scores <= np.sort(scores.ravel())[int(scores.size * level)]
        for row, mask in zip(scores, pruned, strict=True):
            mask[np.argsort(row, kind="stable")[: int(len(row) * level)]] = True
        return pruned
    count, group = map(int, setting.split("of"))
    for row, mask in zip(scores, pruned, strict=True):
        for start in range(0, len(row), group):
            mask[start + np.argsort(row[start : start + group], kind="stable")[:count]] = True
    return pruned


def wanda_score(weight, inputs):
    """inputs: (sequences, tokens, in)"""
    statistic = (inputs.astype(np.float64) ** 2).sum(axis=(0, 1)) / len(inputs)
    return np.abs(weight) * np.sqrt(statistic), statistic


def walked(weights, inputs, setting):
    """Masks of every block's q and up, each measured dense on what the pruned blocks before put out."""
    found, hidden = {}, inputs.astype(np.float64)
    for index, (q, up) in enumerate(weights):
        middle = hidden + hidden @ q.T
        for name, weight, seen in (("q", q, hidden), ("up", up, middle)):
            found[f"seq_b{index}_{name}_mask_{setting}"] = smallest(wanda_score(weight, seen)[0], setting, False)
        q, up = (w * ~found[f"seq_b{index}_{n}_mask_{setting}"] for n, w in (("q", q), ("up", up)))
        middle = hidden + hidden @ q.T
        hidden = middle + np.tanh(middle @ up.T)
    return found


def write_vectors(folder):
    rng = np.random.default_rng(7)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    magnitude, wanda = {}, {}
    for name, shape, tokens in (("c0", (5, 12), 4), ("c1", (18, 30), 7), ("c2", (3, 48), 2)):
        weight, inputs = normal(*shape), normal(2, tokens, shape[1])
        scores, statistic = wanda_score(weight, inputs)
        magnitude[f"{name}_weight"] = wanda[f"{name}_weight"] = weight
        wanda |= {f"{name}_inputs": inputs, f"{name}_scaler_row": statistic.astype(np.float32)}
        for setting in SETTINGS:
            magnitude[f"{name}_mask_{setting}"] = smallest(np.abs(weight), setting, True)
            wanda[f"{name}_mask_{setting}"] = smallest(scores, setting, False)
    ties = (rng.integers(-4, 5, (6, 14)) / 4).astype(np.float32)
    magnitude |= {"ties_weight": ties, "ties_mask_s0.4": smallest(np.abs(ties), "s0.4", True)}
    magnitude["ties_actual_sparsity_s0.4"] = magnitude["ties_mask_s0.4"].mean()
    ones = np.ones((3, 2, 14), dtype=np.float32)
    wanda |= {"ties_weight": ties, "ties_inputs": ones}
    wanda["ties_mask_s0.4"] = smallest(wanda_score(ties, ones)[0], "s0.4", False)
    weights = [(normal(18, 18) / 4, normal(18, 18) / 4) for _ in range(3)]
    wanda["seq_inputs"] = normal(2, 9, 18)
    for index, (q, up) in enumerate(weights):
        wanda |= {f"seq_b{index}_q_weight": q, f"seq_b{index}_up_weight": up}
    for setting in SETTINGS:
        wanda |= walked(weights, wanda["seq_inputs"], setting)
    np.savez(folder / "magnitude.npz", **magnitude)
    np.savez(folder / "wanda.npz", **wanda)
    return magnitude, wanda


def test_vectors_of_other_shapes_and_settings_run_unchanged(tmp_path):
    magnitude, wanda = write_vectors(tmp_path)
    done = run_golden(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for slug, arrays in (("magnitude", magnitude), ("wanda", wanda)):
        for key in arrays:
            if "_mask_" in key or key.endswith("_scaler_row"):
                assert f"[{key}]" in done.stdout, f"{slug}: {key} was not tested"
    assert "1 skipped" in done.stdout  # the variant, which these vectors lack


def test_a_missing_file_an_empty_set_of_cases_and_a_wrong_mask_fail(tmp_path):
    _, wanda = write_vectors(tmp_path)
    (tmp_path / "magnitude.npz").unlink()
    walk = {key: array for key, array in wanda.items() if key.startswith("seq_")}
    wrong = "seq_b2_up_mask_1of3"
    walk[wrong][0, 0] ^= True
    np.savez(tmp_path / "wanda.npz", **walk)
    done = run_golden(tmp_path)
    assert done.returncode == 1
    assert "magnitude.npz does not exist" in done.stdout
    assert "wanda.npz has no key that fits" in done.stdout
    summary = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    failed = {line.split()[1].rpartition("::")[2] for line in summary}
    assert failed == {
        "test_mask_is_the_reference_mask[missing-file]",
        "test_achieved_sparsity_includes_the_ties[missing-file]",
        "test_no_golden_output_is_left_unread[missing-file]",
        "test_mask_is_the_reference_mask[no-case]",
        f"test_walk_measures_dense_blocks_on_pruned_inputs[{wrong}]",
    }
