"""A causal test of the candidate groups on the provisional model."""
