"""Comparisons of normalization methods, run as `python -m benchmarks.<name>`."""
