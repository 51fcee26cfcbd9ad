"""Criteria that score layers."""
