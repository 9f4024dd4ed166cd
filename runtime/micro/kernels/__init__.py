"""Kernels of microcontrollers."""
