"""``python -m sparsebench`` and the console script ``sparsebench``."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line; the exit code is 0 done, 1 some runs failed, 2 bad input, 3 interrupted."""
    from sparsebench.cli import INTERRUPTED
    from sparsebench.cli import main as run

    code = run(sys.argv[1:])
    if code == INTERRUPTED:
        exec("")  # CPython dies of SIGINT at exit when it came while code ran in an exec, unless another one went well
    return code


if __name__ == "__main__":
    sys.exit(main())
