"""Exporters: one format per file, found by its name."""
