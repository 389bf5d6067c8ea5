"""Compares package URLs (the purl specification)."""

from __future__ import annotations

from urllib.parse import parse_qsl, unquote


def matches(wanted: str, found: str | None) -> bool:
    """Return whether ``found`` is the package ``wanted``; version and qualifiers count only if ``wanted`` has them."""
    if found is None:
        return False
    name, version, qualifiers = _parsed(wanted)
    other, other_version, others = _parsed(found)
    return (
        name == other
        and (version is None or version == other_version)
        and qualifiers.items() <= others.items()
    )  # fmt: skip


def _parsed(purl: str) -> tuple[str, str | None, dict[str, str]]:
    rest, _, _ = purl.partition("#")
    rest, _, query = rest.partition("?")
    kind, _, path = rest.removeprefix("pkg:").lstrip("/").partition("/")
    at = path.rfind("@")
    # An @ at the start of a segment begins an npm scope, not a version.
    place, version = (path[:at], unquote(path[at + 1 :])) if at > 0 and path[at - 1] != "/" else (path, None)
    name = unquote(place)
    if kind.lower() == "pypi":
        name = name.lower().replace("_", "-")
    return f"{kind.lower()}/{name}", version, dict(parse_qsl(query))
