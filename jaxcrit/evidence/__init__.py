"""What it takes to score layers: passes over a model, sweeps of changed models, and what they keep."""
