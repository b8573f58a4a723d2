"""From a submission in any accepted format to canonical rows."""
