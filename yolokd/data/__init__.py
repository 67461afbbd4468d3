"""Data sets: the user's, read as Ultralytics reads them, and `shapes`, which yolokd draws."""
