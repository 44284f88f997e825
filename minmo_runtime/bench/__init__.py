"""Measuring the runtime: real-time factors, first audio, GPU kernels. `minmo bench` runs it; the last line is JSON."""
