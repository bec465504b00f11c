"""What goes with what: patterns and levels, stacks of methods, methods and tasks, files behind options."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsebench.catalogue import Declaration
from sparsebench.errors import UserError


def file_content(key: str, path: str) -> str:
    """sha256 of the file an option names, so that an edited file is another run. UserError if unreadable."""
    try:
        return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}={path}: cannot be read ({reason})") from None


def check_pattern(key: str, pattern: str | None) -> str:
    """``unstructured`` or ``n:m``, checked: 1 <= n < m <= 64."""
    if pattern is None or pattern == "unstructured":
        return "unstructured"
    match = re.fullmatch(r"(\d+):(\d+)", str(pattern))
    if match is None:
        raise UserError(f"{key}={pattern}: must be unstructured or n:m with n kept of m, such as 2:4")
    kept, group = int(match[1]), int(match[2])
    if not 1 <= kept < group <= 64:
        raise UserError(f"{key}={pattern}: n:m keeps n of m weights: 1 <= n < m <= 64")
    return f"{kept}:{group}"


def level_of(key: str, asked: float | None, pattern: str) -> float:
    """The sparsity a method is given: what was asked, or what its n:m pattern implies."""
    if pattern == "unstructured":
        return 0.5 if asked is None else asked
    kept, group = map(int, pattern.split(":"))
    implied = 1 - kept / group
    if asked is not None and abs(asked - implied) > 1e-9:
        raise UserError(f"{key}={asked:g} contradicts pattern={pattern}, which keeps {kept} of {group} ({implied:g})")
    return implied


def check_stack(declarations: Sequence[Declaration]) -> None:
    """Refuses two methods that select on one target and phase, a refiner with nothing before it, and a reference that
    does not stand alone."""
    names = [declaration.name for declaration in declarations]
    for declaration in declarations if len(names) > 1 else ():
        if declaration.taxonomy.reference:
            raise UserError(
                f"method=[{','.join(names)}]: {declaration.name} is the model as it is, the reference of the others; "
                "it stands alone"
            )
    selecting: dict[tuple[str, str], str] = {}
    for declaration in declarations:
        place = (declaration.target, declaration.phase)
        if declaration.stage in (None, "select"):
            if place in selecting:
                raise UserError(
                    f"method=[{selecting[place]},{declaration.name}]: both select on {place[0]} ({place[1]}); "
                    "a stack takes one selecting method per target and phase"
                )
            selecting[place] = declaration.name
        elif place not in selecting and not any(target == declaration.target for target, _ in selecting):
            raise UserError(
                f"method={declaration.name}: stage {declaration.stage} needs a selecting method before it, "
                f"such as method=[magnitude,{declaration.name}]"
            )


def holding(entries: Sequence[str], options: dict[str, Any]) -> list[str]:
    """What of a declaration's entries holds with these options: ``decode if protocol=continuation`` is ``decode``."""
    found = []
    for entry in entries:
        what, _, condition = entry.partition(" if ")
        if not unmet(condition, options):
            found.append(what)
    return found


def unmet(condition: str, options: Mapping[str, Any]) -> str | None:
    """The first part of a declaration's condition that does not hold with these options; None if all do.

    ``form=natural and name=vt|cwe``: parts are joined by ``and``, options and values of one part by ``|``; a name
    alone asks for any value but none, 0 and false; of an option that is a list, one value is enough.
    """
    for part in condition.split(" and ") if condition else ():
        keys, _, values = part.partition("=")
        given = [options.get(key) for key in keys.split("|")]
        held = {str(one).lower() for value in given for one in (value if isinstance(value, tuple) else (value,))}
        if not (held & set(values.split("|")) if values else any(given)):
            return part
    return None


def check_task(declarations: Sequence[Declaration], task: Declaration, options: dict[str, Any]) -> None:
    """Refuses a method whose phase the task cannot give with these options."""
    gives = holding(task.gives, options)
    for declaration in declarations:
        needs = {"once": [], "train": ["train"]}.get(declaration.phase, declaration.phase.split("+"))
        for need in needs:
            if need not in gives:
                raise UserError(
                    f"method={declaration.name} acts in phase {need}, which task={task.name} does not give here; "
                    f"the task gives: {', '.join(task.gives)}"
                )
