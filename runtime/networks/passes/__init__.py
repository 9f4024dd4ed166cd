"""Passes over the operations of a region: each makes fewer of them, with the same results."""
