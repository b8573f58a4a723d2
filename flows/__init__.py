"""Prefect flows, what they show, and the command line. The only package that knows Prefect."""

from __future__ import annotations

import os

ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "pipeline,stages,storage",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # 20 are too few on a busy machine
    "PREFECT_SERVER_UI_V2_ENABLED": "false",  # the newer pages ask an analytics host
}
"""What is set where the user has not: nothing is fetched or reported, and the stages' own logs appear with the run."""

for (
    _name,
    _value,
) in ENVIRONMENT.items():  # here: Prefect reads it when it is imported, and every module of this package comes after
    os.environ.setdefault(_name, _value)
