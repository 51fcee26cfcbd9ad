"""Rows, templates, batches."""
