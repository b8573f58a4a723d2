"""What all of ByeSight stands on: records, configuration, models, attention, engines."""

__version__ = "0.1.0"
