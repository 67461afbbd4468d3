"""Processes, signals, threads, random state, files and the terminal; knows nothing of distillation."""
