"""Layers of int8 codes: what they compute, and the calls of kernels that compute it."""
