"""The report of a run: one HTML file with its result, curves, images and maps."""
