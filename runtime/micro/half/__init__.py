"""Layers of half-precision numbers, forwards and backwards."""
