"""Rows of our own among the submitted ones, to measure what would be found."""
