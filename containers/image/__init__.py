"""Images: base, runtime, layers, registries, and a release's own image."""
