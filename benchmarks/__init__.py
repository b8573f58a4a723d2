"""Every claim of the README is made by a command of this package. Ground truth is used here, and never by a stage."""
