"""sparsebench: one grid, honest axes and checked claims for every kind of sparsity."""

__version__ = "0.1.0"
