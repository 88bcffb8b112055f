"""Spectral batch normalization: the method, and the transforms of real maps that it takes."""
