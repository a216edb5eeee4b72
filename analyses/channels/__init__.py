"""Channels of a model: which are hot, how profiles differ between models, and what of it is chance."""
