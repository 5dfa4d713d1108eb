"""Prune a model, in memory or from files to files: what is decided for the whole model, then layer by layer."""
