"""A verdict for every row."""
