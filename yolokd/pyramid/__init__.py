"""Feature pyramids: levels, boxes on their grids, and the pairing of two models."""
