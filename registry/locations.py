"""Whether a version's files are where the registry keeps files.

The location of a version is not signed: everyone who may register a version chooses it. So it is a hint:
it is followed only below the place where the experiment that Slipway uploads to keeps its files, which no request
changes once it is made; or where the MLflow server hands the files out itself. Elsewhere it would lead to folders of
this machine, or have MLflow's client send the operator's user and password to a host of the attacker's.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from registry.catalog import artifact_root
from registry.errors import PullError
from registry.tracking import is_location, local_folder, shown

_PROXIED = "mlflow-artifacts"
_HTTP = ("http", "https")


def checked(location: str, tracking_uri: str) -> str:
    """Return the location, once it lies where the registry at ``tracking_uri`` keeps its files.

    Raises:
        PullError: It lies elsewhere, or is malformed.
        TrackingError: The registry can't be asked.
    """
    if not is_location(location):
        raise PullError(f"the registry at {shown(tracking_uri)} gives a location that is not a valid URI or path")
    parts, server = urlsplit(location), urlsplit(tracking_uri)
    if parts.scheme == _PROXIED and server.scheme in _HTTP and _climbs(parts) is False:
        if parts.netloc in ("", server.netloc.rpartition("@")[2]):
            return location
    elif within(location, artifact_root(tracking_uri)) and (parts.scheme not in _HTTP or _same_host(parts, server)):
        return location
    raise PullError(
        f"the registry at {shown(tracking_uri)} says that files are at {shown(location)!r}, which is outside its"
        " artifact store: nothing was read from there"
    )


def checked_folder(location: str, root: str | None) -> Path | None:
    """Return the folder of this machine that a location names; None where it is elsewhere, or not below ``root``."""
    return local_folder(location) if within(location, root) else None


def within(location: str, root: str | None) -> bool:
    """Whether a location lies below another, of the same scheme and host."""
    if root is None or not is_location(location):
        return False
    folder, above = local_folder(location), local_folder(root)
    if folder is not None and above is not None:
        return Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(above))
    one, other = urlsplit(location), urlsplit(root)
    if (one.scheme, one.netloc) != (other.scheme, other.netloc) or one.query != other.query or one.fragment:
        return False
    return not _climbs(one) and f"{unquote(one.path)}/".startswith(f"{unquote(other.path).rstrip('/')}/")


def _climbs(parts: SplitResult) -> bool:
    return ".." in unquote(parts.path).replace("\\", "/").split("/")


def _same_host(one: SplitResult, other: SplitResult) -> bool:
    return one.scheme == other.scheme and one.netloc.rpartition("@")[2] == other.netloc.rpartition("@")[2]
