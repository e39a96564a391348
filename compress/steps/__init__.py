"""Compression steps: one method per file, found by its path."""
