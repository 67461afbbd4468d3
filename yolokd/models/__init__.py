"""Detectors as checkpoint files and as modules, their tasks, scores and sizes; in teachers/ how a teacher runs."""
