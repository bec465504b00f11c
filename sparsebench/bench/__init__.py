"""What sparsebench measures about itself, one module per name: ``bench <name> [key=value ...]``.

A module holds ``Options`` (a declaration) and ``run(options, say)``, which returns a ``Report``. Performance is a
ratio of two things measured side by side in one run; nothing here is part of a run's record.
"""

from sparsebench.bench.base import Report, Say

__all__ = ["Report", "Say"]
