"""The GPU benchmark: `python -m benchmarks.gpu`, or `make bench-gpu`."""
