"""What goes with what: patterns and levels, stacks of methods, methods and tasks, files behind options."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
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
    """Refuses two methods that select on one target and phase, and a refiner with nothing before it."""
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
        key, _, value = condition.partition("=")
        if not condition or str(options.get(key)) == value:
            found.append(what)
    return found


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
