"""Every name of Ultralytics that yolokd replaces while it runs, and why."""
