"""What the models make of images: detections and maps."""
