"""Training of chosen layers: partition of the parameters, forward pass, optimizer, step, loop, checkpoints."""
