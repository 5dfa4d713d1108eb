"""Quantize a model, in memory or from files to files, block by block."""
