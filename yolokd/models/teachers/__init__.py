"""Teachers: frozen detectors and backbones, their precision, and how they run beside the student."""
