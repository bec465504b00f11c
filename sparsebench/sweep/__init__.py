"""Sweeps: a named grid of runs, planned as a whole, launched in chunks, finished whatever happens."""
