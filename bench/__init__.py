"""Benchmarks of tilewise beside its rivals: `python -m pytest bench`, `python -m bench --help`."""
