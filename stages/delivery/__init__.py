"""The delivery folder, assembled and committed."""
