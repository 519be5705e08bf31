"""Benchmarks of pmc_fast against the published loop and against peers: `python -m benchmarks --help`."""
