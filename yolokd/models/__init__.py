"""Detectors as checkpoint files and as modules; the teacher, its precision and its score."""
