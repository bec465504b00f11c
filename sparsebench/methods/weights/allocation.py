"""Layer-wise allocation: how a total level is shared out over the layers, one place for every pruner.

Rules give the DENSITY (kept / all) of each layer from its shape, the total held at
sum(density_l * n_l) = density * sum(n_l):

    uniform  density_l = density
    er       density_l ~ (in + out) / (in * out)                 Erdos-Renyi (Mocanu et al. 2018)
    erk      density_l ~ (sum of all dims) / (product of dims)   with kernel sizes (Evci et al. 2020)

For linear layers er and erk are the same. A density that would exceed 1 is set to 1 and the others
are solved again. Shapes are those of weights: (out, in) or (out, in, kernel, kernel). The released
code of Liu et al. 2022 (VITA-Group/Random_Pruning) is followed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sparsebench.errors import UserError

RULES = ("uniform", "er", "erk", "table")
Shape = Sequence[int]
T = TypeVar("T")

_SMALL_DENSITY = 0.2  # uniform_plus: the classifier keeps this much, and the others pay for it below it
_TABLE_SLACK = 5e-4  # a table that names every layer may miss the asked total by rounding in its third digit


def levels(rule: str, shapes: Mapping[str, Shape], sparsity: float, table: str | None = None) -> dict[str, float]:
    """The sparsity of every layer in [0, 1): {name: zeros / all}, the total at ``sparsity``.

    ``rule``: one of RULES; ``table``: the file of rule ``table``. UserError when the table does not fit.
    """
    if rule == "uniform":
        return dict.fromkeys(shapes, sparsity)
    if rule == "table":
        sizes = {name: prod(shape) for name, shape in shapes.items()}
        return _from_table(read_table(table), sizes, sparsity, f"table={table}")
    densities = {"er": er, "erk": erk}[rule](list(shapes.values()), 1 - sparsity)
    # rounded: 1 - density is a hair off where it should be a half, and counts are truncated
    return {name: round(1 - density, 12) for name, density in zip(shapes, densities, strict=True)}


def uniform(shapes: Sequence[Shape], density: float) -> list[float]:
    """The same density everywhere."""
    return [density] * len(shapes)


def er(shapes: Sequence[Shape], density: float, power: float = 1.0) -> list[float]:
    """Erdos-Renyi densities: kernel sizes do not enter the rule, but weigh in the total."""
    return _solve(shapes, density, [(sum(shape[:2]) / prod(shape[:2])) ** power for shape in shapes])


def erk(shapes: Sequence[Shape], density: float, power: float = 1.0) -> list[float]:
    """Erdos-Renyi-kernel densities: all dimensions enter the rule."""
    return _solve(shapes, density, [(sum(shape) / prod(shape)) ** power for shape in shapes])


def uniform_plus(shapes: Sequence[Shape], density: float, variant: str = "corrected") -> list[float]:
    """Uniform with a dense first layer and, below density 0.2, a classifier (the last layer) of 0.2.

    ``variant=reference`` shares what is left over ALL weights, as the released code does (the total
    then stays below ``density``, and at very small ones the others are negative: empty layers);
    ``corrected`` over the weights of the other layers. UserError when nothing is left for them.
    """
    if density >= _SMALL_DENSITY:
        return [1.0, *[density] * (len(shapes) - 1)]
    sizes = [prod(shape) for shape in shapes]
    left = density * sum(sizes) - sizes[0] - _SMALL_DENSITY * sizes[-1]
    others = sum(sizes) if variant == "reference" else sum(sizes[1:-1])
    if variant != "reference" and (left < 0 or others == 0):
        raise UserError(
            f"density={density:g}: too small for uniform_plus, whose dense first layer and classifier need more"
        )
    return [1.0, *[left / others] * (len(shapes) - 2), _SMALL_DENSITY]


def _solve(shapes: Sequence[Shape], density: float, raw: Sequence[float]) -> list[float]:
    """Densities in proportion to ``raw``; the largest are set to 1 until none would exceed it."""
    sizes = [prod(shape) for shape in shapes]
    dense: set[int] = set()
    while free := [index for index in range(len(sizes)) if index not in dense]:
        budget = sum(density * sizes[i] for i in free) - sum((1 - density) * sizes[i] for i in dense)
        scale = budget / sum(raw[i] * sizes[i] for i in free)
        largest = max(raw[i] for i in free)
        if largest * scale <= 1:
            return [1.0 if i in dense else raw[i] * scale for i in range(len(sizes))]
        dense |= {i for i in free if raw[i] == largest}  # every layer at the maximum, not only one
    return [1.0] * len(sizes)


def read_table(file: str | None) -> dict[str, float]:
    """A YAML or JSON mapping {pattern of layer names: sparsity in [0, 1)}. UserError when it is not one."""
    if file is None:
        raise UserError("allocation=table: name the file with table=<path>")
    content = read_patterns(file, "sparsities, such as '*q_proj': 0.3")
    for pattern, value in content.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise UserError(f"table={file}: {pattern}: {value}: a sparsity must be a number >= 0 and < 1")
    return {pattern: float(value) for pattern, value in content.items()}


def read_patterns(file: str, to_what: str) -> dict[str, Any]:
    """A YAML or JSON mapping {pattern of layer names: anything}. UserError when it is not one; ``to_what``: what the
    message says it should map to."""
    try:
        content = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise UserError(f"table={file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"table={file}: not valid YAML or JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"table={file}: must map patterns of layer names to {to_what}")
    return {str(pattern): value for pattern, value in content.items()}


def first_fits(table: Mapping[str, T], names: Collection[str], where: str) -> dict[str, T]:
    """By name what the first pattern that fits it maps to; names that none fits are not there. UserError, which begins
    with ``where``, for a pattern that fits none of the names."""
    found: dict[str, T] = {}
    for pattern, value in table.items():
        if not any(fnmatch(name, pattern) for name in names):
            raise UserError(f"{where}: {pattern} fits no layer in scope, such as {next(iter(names))}")
        found = {name: value for name in names if fnmatch(name, pattern)} | found
    return found


def _from_table(table: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, where: str) -> dict[str, float]:
    """The first pattern that fits a layer sets its level; layers that none fits share the rest of the total."""
    found = first_fits(table, sizes, where)
    total = sum(sizes.values())
    named = sum(value * sizes[name] for name, value in found.items())
    rest = sum(size for name, size in sizes.items() if name not in found)
    if not rest:
        if abs(named / total - sparsity) > _TABLE_SLACK:
            raise UserError(f"{where}: its levels make a total of {named / total:.4g}, asked is sparsity={sparsity:g}")
        return {name: found[name] for name in sizes}
    level = round((sparsity * total - named) / rest, 12)
    if not 0 <= level < 1:
        raise UserError(f"{where}: with its levels the other layers would need {level:.4g} for sparsity={sparsity:g}")
    return {name: found.get(name, level) for name in sizes}
