"""Sparse formats and the kernels that run them: C on a CPU, torch as the reference."""
