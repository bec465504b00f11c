"""How many bits each matrix of a model gets: a user's table, a recipe, and a solver for an average.

The average is that of Zhang et al. 2025 (arXiv 2504.02010), over the whole model:

    sum_m bits_m * numel_m / sum_m numel_m

m runs over all parameters, each once: linear layers, embedding, head (if tied the two are one), and what is not
quantised (norms, biases, layers out of scope), which counts with the bits of its dtype. bits_m are stored bits: codes,
scales and zero points.

The recipe follows what the paper's dynamic quantisations of DeepSeek-R1 are said to do (second-hand): the experts'
matrices are the low class and get what the average leaves; 6 bits go to the head, to down projections of the first
tenth of the blocks, and, where there are experts, to what the MLPs have beside them; 4 bits to attention and embedding.
Without experts the low class is every other matrix of the MLPs; as it is not 95% of the model then, a low average can
ask for less than the recipe: its bits are capped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsebench.errors import UserError
from sparsebench.methods.weights.allocation import first_fits, read_patterns
from sparsebench.methods.weights.base import Layer
from sparsebench.methods.weights.gqsa_groups import TERNARY, count_of, group_bits
from sparsebench.models.blocks import decoder_blocks

LEVELS = (1.0, TERNARY, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
Takes = Callable[[str, float], int]  # name of a matrix, its bits -> what it takes, in bits
AS_IT_IS = 16.0  # in a table: this matrix is not quantised
LOW = "low"  # in a table: of the class that gets what the average leaves

_ATTENTION = _EMBEDDING = 4.0
_DELICATE = 6.0  # head, early down projections, what is beside experts
_EARLY = 10  # one block of so many, the first ones
_DOWN = ("down_proj", "fc2", "w2", "dense_4h_to_h", "c_proj")
_EXAMPLE = "bits, such as '*q_proj': 4, '*up_proj': {bits: 3, group_size: 64} or '*experts*': low"


@dataclass(frozen=True)
class Matrix:
    """A weight that can be quantised. ``names``: of the layers that have it (a tied head has the embedding's), or of
    the parameter where experts are stacked in one; ``modules``: these layers; ``block``: None for the two ends."""

    names: tuple[str, ...]
    parameter: nn.Parameter
    modules: tuple[nn.Module, ...] = ()
    block: int | None = None
    head: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def weight(self) -> Tensor:
        """(rows, inputs): a view; stacked experts below each other, groups along their last dimension."""
        return self.parameter.data.view(-1, self.parameter.shape[-1])

    @property
    def touches(self) -> set[str]:
        """Names of the parameter."""
        return {f"{name}.weight" if self.modules else name for name in self.names}


@dataclass(frozen=True)
class Rule:
    """What a table says of a matrix. ``bits``: None for the low class; ``group``: None for the method's own."""

    bits: float | None
    group: int | None = None


@dataclass(frozen=True)
class Form:
    """How a matrix is stored. ``group``: inputs of a group, a row at most."""

    bits: float
    group: int
    symmetric: bool
    scale_bits: int

    def takes(self, weight: Tensor) -> int:
        """Bits of a weight (rows, inputs), scales and zero points included."""
        if self.bits == AS_IT_IS:
            return 8 * weight.nbytes
        rows, columns = weight.shape
        zero_bits = 0 if self.symmetric else int(self.bits)
        return rows * count_of(columns, self.group) * group_bits(self.group, self.bits, self.scale_bits, zero_bits)


def matrices_of(model: nn.Module, layers: Sequence[Layer], in_scope: Callable[[str], bool]) -> list[Matrix]:
    """The layers' weights and stacked experts in scope, block by block, then embedding and head if they (tied: both)
    are in scope."""
    prefix, blocks = decoder_blocks(model)
    known = {layer.name: layer.module for layer in layers}
    found = []
    for index, block in enumerate(blocks):
        for path, parameter in block.named_parameters(f"{prefix}.{index}"):
            name = path.removesuffix(".weight")
            if name in known:
                found.append(Matrix((name,), parameter, (known[name],), index))
            elif parameter.dim() == 3 and "experts" in name.split(".") and in_scope(name):
                found.append(Matrix((name,), parameter, (), index))
    if not isinstance(model, PreTrainedModel):
        return found
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared: dict[int, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if module is embedding or module is head:
            shared.setdefault(id(module.weight), {})[name] = module
    for modules in shared.values():
        if all(map(in_scope, modules)):
            parameter = cast(nn.Parameter, next(iter(modules.values())).weight)
            found.append(Matrix(tuple(modules), parameter, tuple(modules.values()), head=head in modules.values()))
    return found


def rules_of(file: str, matrices: Sequence[Matrix]) -> dict[str, Rule]:
    """What a YAML or JSON table {pattern of layer names: bits, low, or {bits, group_size}} says, by name of the
    matrix; what no pattern fits is not there. UserError when it is no such table or a pattern fits none."""
    where = f"table={file}"
    table = {pattern: _rule(f"{where}: {pattern}", value) for pattern, value in read_patterns(file, _EXAMPLE).items()}
    fits = first_fits(table, [name for one in matrices for name in one.names], where)
    known = {one.name: [fits[name] for name in one.names if name in fits] for one in matrices}
    return {name: rules[0] for name, rules in known.items() if rules}


def _rule(where: str, value: Any) -> Rule:
    given = value if isinstance(value, dict) else {"bits": value}
    if "bits" not in given or set(given) - {"bits", "group_size"}:
        raise UserError(f"{where}: {value}: must be bits, or a mapping of bits and group_size")
    bits, group = given["bits"], given.get("group_size")
    low = bits == LOW
    if not low and (isinstance(bits, bool) or bits not in (*LEVELS, AS_IT_IS)):
        valid = ", ".join(f"{one:g}" for one in LEVELS)
        raise UserError(f"{where}: bits={bits}: must be {valid}, {AS_IT_IS:g} (as it is) or {LOW}")
    if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 4):
        raise UserError(f"{where}: group_size={group}: must be a whole number >= 4")
    return Rule(None if low else float(bits), group)


def recipe(matrices: Sequence[Matrix], blocks: int) -> dict[str, float | None]:
    """The bits of the recipe in a model of so many blocks, by name of the matrix; None for the low class."""
    experts = any("experts" in one.name.split(".") for one in matrices)
    return {one.name: _class(one, -(-blocks // _EARLY), experts) for one in matrices}


def _class(matrix: Matrix, early: int, experts: bool) -> float | None:
    path = matrix.name.split(".")
    if matrix.block is None:
        return _DELICATE if matrix.head else _EMBEDDING
    if any("attn" in part or "attention" in part for part in path):
        return _ATTENTION
    beside = experts and "experts" not in path
    return _DELICATE if beside or (path[-1] in _DOWN and matrix.block < early) else None


def given(names: Iterable[str], rules: Mapping[str, Rule], plain: float, where: str) -> dict[str, float]:
    """Without a target: what the rules say, ``plain`` bits for the others. UserError when a rule says low."""
    if low := next((name for name, rule in rules.items() if rule.bits is None), None):
        raise UserError(f"{where}: {low} is {LOW}, which goes with target_avg_bits")
    named = {name: rule.bits for name, rule in rules.items() if rule.bits}
    return dict.fromkeys(names, plain) | named


def to_average(
    target: float, wanted: Mapping[str, float | None], rules: Mapping[str, Rule], takes: Takes, rest: int, entries: int
) -> tuple[dict[str, float], float | None]:
    """With a target: what the rules say, and what ``solve`` finds for the others, with the cap of the recipe.

    ``wanted``: the recipe; ``rest``: bits of what cannot be quantised; ``entries``: of the whole model. UserError when
    the target is out of reach."""
    named = {name: rule.bits for name, rule in rules.items() if rule.bits}
    free = {name: None if name in rules else bits for name, bits in wanted.items() if name not in named}
    rest += sum(takes(name, bits) for name, bits in named.items())
    least, most = ((rest + sum(takes(name, bits) for name in free)) / entries for bits in (LEVELS[0], LEVELS[-1]))
    found = solve(free, takes, target * entries - rest) if target <= most else None
    if found is None:
        raise UserError(
            f"target_avg_bits={target:g}: this model can have {least:.3f} to {most:.3f}, "
            f"with {LEVELS[0]:g} to {LEVELS[-1]:g} bits for every matrix in scope that no table names"
        )
    return found[0] | named, found[1]


def solve(
    wanted: Mapping[str, float | None], takes: Takes, room: float
) -> tuple[dict[str, float], float | None] | None:
    """Bits from LEVELS that together take at most ``room`` bits, as many as fit, and what the recipe's bits were capped
    at (None: not at all). None if even one bit each is too much.

    ``wanted``: the bits of the recipe, None for the low class. That is scaled: all of it to one level and then, from
    the first on, single matrices to the next. Above the recipe's bits the others go along; where one bit for the low
    class is too much, the recipe is capped."""

    def at(cap: float, low: float) -> dict[str, float]:
        return {name: low if bits is None else max(low, min(bits, cap)) for name, bits in wanted.items()}

    def total(bits: Mapping[str, float]) -> int:
        return sum(takes(name, one) for name, one in bits.items())

    cap = next((level for level in reversed(LEVELS) if total(at(level, LEVELS[0])) <= room), None)
    if cap is None:
        return None
    fitting = [level for level in LEVELS if total(at(cap, level)) <= room]
    found = at(cap, fitting[-1])
    spare = room - total(found)
    for name, more in at(cap, LEVELS[min(len(fitting), len(LEVELS) - 1)]).items():
        extra = takes(name, more) - takes(name, found[name])
        if extra <= spare:
            found[name], spare = more, spare - extra
    capped = cap < max((bits for bits in wanted.values() if bits is not None), default=0.0)
    return found, cap if capped else None
