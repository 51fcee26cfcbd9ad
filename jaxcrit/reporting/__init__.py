"""Plots, the HTML page, exporters."""
