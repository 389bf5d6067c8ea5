"""What can go wrong around containers; every message is one line that says what to do."""

from __future__ import annotations


class ContainerError(Exception):
    """The family: catch this to catch them all."""


class EngineError(ContainerError):
    """No container engine answers, one cannot be started, or it went away in the middle of its work."""


class ProfileError(ContainerError):
    """A runtime profile or its lock does not say what it must."""


class WheelError(ContainerError):
    """A wheel could not be had, or is not the one that the lock names."""


class ImageError(ContainerError):
    """A base, a runtime or a model's image could not be made, found or pushed."""


class UnreachableRegistryError(ImageError):
    """A container registry does not answer: the same may go well in a while."""


class PolicyError(ContainerError):
    """The scan's policy, a waiver or a VEX document does not say what it must."""
