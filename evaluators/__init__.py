"""Evaluators: one measurement per file, found by its name."""
