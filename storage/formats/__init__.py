"""Submission formats in and out: `open_submission` finds the format, what it returns reads rows and writes them back."""

from storage.formats.base import Pick, Reason, Submission
from storage.formats.detect import detect, digest_submission, open_submission

__all__ = ["Pick", "Reason", "Submission", "detect", "digest_submission", "open_submission"]
