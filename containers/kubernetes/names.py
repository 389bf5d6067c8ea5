"""Valid Kubernetes names, and amounts in Kubernetes' own notation, so that applying them again changes nothing."""

from __future__ import annotations

import hashlib
import math
import re
from typing import Annotated

from pydantic import Field

ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
"""An object's name: a DNS-1123 subdomain."""
# https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#syntax-and-character-set
_NAME = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
MetadataKey = Annotated[str, Field(pattern=rf"^([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_NAME}$")]
"""The key of a label or an annotation."""
LabelValue = Annotated[str, Field(pattern=rf"^({_NAME})?$")]
"""The value of a label."""
# A Service's name is a DNS-1035 label, 63 characters at most, and so is a label's value; the longest suffix here is
# `-tokenizer`.
_LONGEST = 63 - len("-tokenizer")
_DIGEST = 6


def object_name(line: str) -> str:
    """Return the prefix of a release line's object names: a DNS-1035 label with room for a suffix.

    ``llama-3.1-8b-awq`` becomes ``llama-3-1-8b-awq``. A name that is too long is cut and ends in the first digits of
    its SHA-256, so that different lines have different names.
    """
    label = re.sub(r"[^a-z0-9]+", "-", line.lower()).strip("-")
    label = label if label[:1].isalpha() else f"r-{label}".rstrip("-")
    if len(label) <= _LONGEST:
        return label
    digest = hashlib.sha256(line.encode()).hexdigest()[:_DIGEST]
    return f"{label[: _LONGEST - _DIGEST - 1].rstrip('-')}-{digest}"


def mebibytes(count: float) -> str:
    """Format an amount of MiB, rounded up: ``4Gi`` for 4096, as Kubernetes does."""
    whole = math.ceil(count)
    return f"{whole // 1024}Gi" if whole % 1024 == 0 else f"{whole}Mi"


def thousandths(count: float) -> str:
    """Format thousandths, rounded: ``3`` for 3000, ``500m`` for 500."""
    whole = round(count)
    return f"{whole // 1000}" if whole % 1000 == 0 else f"{whole}m"
