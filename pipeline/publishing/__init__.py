"""Publishes a release outside of the registry: on a model hub, in a container registry, or in a bucket."""
