"""Continue an interrupted run: what it left, which settings may change, and what is restored.

Ultralytics' checkpoint holds a float16 average of the weights and of the optimizer's state, and no random state. The
sidecar beside it (sidecar.py) holds the rest in full precision.
"""
