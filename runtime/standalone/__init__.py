"""A model, its plan, its vocabulary and its kernels as one static executable for Linux."""
