"""Images: base, runtime, layers, registries, and the image of a release."""
