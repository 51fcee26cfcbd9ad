"""Representation similarity as pure functions of arrays. Knows nothing of models, data or files."""
