"""Convolution and norm, residual blocks, networks."""
