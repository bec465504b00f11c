"""The nine tasks of The Sparse Frontier: one declared task, ``sparse_frontier``, and its generators."""
