"""Detectors, as files and as modules."""
