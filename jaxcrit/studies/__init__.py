"""Whole runs built of the rooms below."""
