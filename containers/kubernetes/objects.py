"""An object of Kubernetes' API, or of one of its extensions."""

from __future__ import annotations

from typing import Any

KubernetesObject = dict[str, Any]
"""Its schema is Kubernetes', or that of the extension that `apiVersion` names."""
