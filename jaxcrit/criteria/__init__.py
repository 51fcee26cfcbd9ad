"""Ways to score layers: one file for each criterion, with its formula, its tap and its options, and the registry."""
