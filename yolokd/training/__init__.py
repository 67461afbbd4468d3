"""Ultralytics' training loop, with a teacher."""
