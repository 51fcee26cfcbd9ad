"""One file per way to score layers."""
