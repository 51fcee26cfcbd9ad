"""Decoder, configuration, weight table, checkpoints."""
