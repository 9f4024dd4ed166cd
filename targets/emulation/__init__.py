"""Run kernels that are built for other CPUs, in an emulator: tests and instruction counts."""
