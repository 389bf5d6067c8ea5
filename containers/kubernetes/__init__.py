"""A release as it runs in Kubernetes: every number from its own measurements, with the evidence beside it."""
