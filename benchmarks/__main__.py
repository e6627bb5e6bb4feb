"""`python -m benchmarks`: the benchmark of whole models on the CPU."""

from benchmarks.cpu import main

main()
