"""Scaling laws: each declared in a few lines, all fitted, checked and compared in one way.

A law of your own is a ``base.Law`` object behind an entry point of the group ``sparsebench.laws``.
"""
