"""`yolokd deploy`: what a checkpoint is in each format that could be shipped: its size, score, latency and memory.

Imports nothing: a process that measures one format imports this package, and its memory must be that of the runtime.
"""
