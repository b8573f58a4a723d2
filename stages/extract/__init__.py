"""Attention statistics of every example."""
