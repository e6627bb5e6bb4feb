"""Benchmarks: one script each, results as JSON under `results/`."""
