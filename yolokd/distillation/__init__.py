"""The loss of one batch."""
