"""The suites by name."""

from __future__ import annotations

from benchmarks.purification import PURIFICATION

SUITES = {suite.name: suite for suite in (PURIFICATION,)}
