"""For a borrowed GPU: one command of at most ten minutes, one table. `python -m minmo_runtime.bench.gpu`."""
