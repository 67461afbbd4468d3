"""Data sets: the user's, read as Ultralytics reads them, and the embedded one."""
