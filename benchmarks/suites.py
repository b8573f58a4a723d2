"""The suites by name."""

from __future__ import annotations

from benchmarks.clean import CLEAN_SUITE
from benchmarks.cost import COST
from benchmarks.detection import DETECTION
from benchmarks.purification import PURIFICATION

SUITES = {suite.name: suite for suite in (PURIFICATION, DETECTION, CLEAN_SUITE, COST)}
