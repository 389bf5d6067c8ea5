"""A place to run an image: isolated, measured, and removed."""
