"""Sparse formats and the kernels that run them: C on a CPU, Triton on a GPU, torch as the reference."""
