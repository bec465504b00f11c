"""The tasks that are generated, by name."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from sparsebench.tasks.scbench.documents import repoqa, repoqa_and_kv, summary, summary_with_needles
from sparsebench.tasks.scbench.generators import Draft, kv, many_shot, mf, mix, prefix_suffix, vt

Generator = Callable[[Random, int, int], Draft]
GENERATORS: dict[str, tuple[Generator, Callable[[int], int]]] = {  # and the least n for so many turns
    "kv": (kv, lambda turns: turns),
    "prefix_suffix": (prefix_suffix, lambda turns: 5 * turns),
    "vt": (vt, lambda turns: 0),
    "mf": (mf, lambda turns: 1),
    "many_shot": (many_shot, lambda turns: turns),
    "repoqa": (repoqa, lambda turns: turns),
    "summary": (summary, lambda turns: 0),
    "summary_with_needles": (summary_with_needles, lambda turns: turns),
    "repoqa_and_kv": (repoqa_and_kv, lambda turns: turns),
    "mix": (mix, lambda turns: turns),
}
MIXED = ("mix", "summary_with_needles", "repoqa_and_kv")
