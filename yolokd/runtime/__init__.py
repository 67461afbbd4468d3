"""Processes, signals, threads, files and the terminal: nothing of distillation."""
