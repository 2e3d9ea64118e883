"""Benchmarks: each prints JSON with its own physical limit, measured in the same run."""
