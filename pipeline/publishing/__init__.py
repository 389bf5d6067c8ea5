"""Publishes a release outside of the registry: on a model hub, in a container registry, a bucket, or a file in Git."""
