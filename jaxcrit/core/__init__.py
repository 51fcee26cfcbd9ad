"""Words and files everything shares: scores, layer sets, errors, hashes, formats. Knows nothing of the rest."""
