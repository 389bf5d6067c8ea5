"""Errors of container engines, images and scans. Each message is one line that says what to do."""

from __future__ import annotations


class ContainerError(Exception):
    """Base class of all errors of this package."""


class EngineError(ContainerError):
    """No container engine answers, it could not be started, or it stopped during an operation."""


class ProfileError(ContainerError):
    """A runtime profile or its lock is invalid."""


class WheelError(ContainerError):
    """A wheel could not be downloaded, or differs from the one that the lock names."""


class ImageError(ContainerError):
    """An image (base, runtime or model) could not be built, found or pushed."""


class UnreachableRegistryError(ImageError):
    """A container registry does not answer; a later try may succeed."""


class PolicyError(ContainerError):
    """The scan's policy, a waiver or a VEX document is invalid."""


class ScanError(ContainerError):
    """An image could not be scanned, or Trivy's output or the stored evidence is incomplete."""


class SandboxError(ContainerError):
    """A container did not start, was not healthy in time, or stopped; the message says why and where its log is."""


class UnhealthyError(SandboxError):
    """The server in the container stopped before it was healthy, or was not healthy in time: the release fails."""
