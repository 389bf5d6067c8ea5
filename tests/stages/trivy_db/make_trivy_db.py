"""Write a Trivy vulnerability database (schema 2) from a short list of advisories: for tests, never for a release.

    python make_trivy_db.py advisories.json --cache-dir DIR [--tar db.tar.gz] [--age-hours 48]

DIR/db/ receives trivy.db (a BoltDB file) and metadata.json, which is where ``trivy --cache-dir DIR`` looks; --tar packs
the same two files the way Trivy expects them in an OCI layer. Standard library only.

One advisory is one object:
  id        CVE-..., GHSA-..., ...
  target    "debian 12", "alpine 3.20", ... or a language: pip, npm, go, ...
  package   Debian: the SOURCE package; pip: any spelling of the project name
  fixed     first fixed version; leave out for an unfixed one
  severity  UNKNOWN | LOW | MEDIUM | HIGH | CRITICAL
  optional  vulnerable (ranges, languages only; default "<fixed"), status (affected, will_not_fix, ...), title,
            description, references, cvss (v3 score), cvss_vector, severity_source (default: nvd for a distribution,
            ghsa for a language; the distribution's own name stores the severity on the package, as Debian does)
"""

from __future__ import annotations

import argparse
import io
import json
import re
import struct
import tarfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

# A BoltDB file is a row of fixed-size pages; integers are little-endian.
#   page    id u64 | flags u16 | count u16 | overflow u32 | body
#   meta    (pages 0 and 1) magic, version, page size, flags u32 | root pgid, root sequence, freelist pgid,
#           high-water pgid, txid u64 | FNV-1a 64
#   leaf    count x (flags u32, pos u32, ksize u32, vsize u32), then key+value
#   branch  count x (pos u32, ksize u32, child pgid u64), then keys
# pos counts from the element itself to its key. A bucket is a leaf entry with flag 1 whose value is (root pgid u64,
# sequence u64); root 0 means that the bucket's only page follows inside the value ("inline").
PAGE = 4096
HEADER = 16  # bytes of a page's header, and of every element
BRANCH, LEAF, META, FREELIST = 0x01, 0x02, 0x04, 0x10

Item = tuple[int, bytes, bytes]  # flag or child page, key, value
Tree = dict[bytes, Any]  # nested: bytes, or a Tree

SEVERITIES = ["UNKNOWN", "LOW", "MEDIUM", "HIGH", "CRITICAL"]
STATUSES = [
    "unknown", "not_affected", "affected", "fixed", "under_investigation", "will_not_fix", "fix_deferred",
    "end_of_life",
]  # fmt: skip


def write_database(
    cache: Path, advisories: Sequence[dict[str, Any]], *, age_hours: float = 0.0, archive: Path | None = None
) -> Path:
    """Write the database into a Trivy cache folder; return its path. Over 24 hours of age make it stale for Trivy."""
    built = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=age_hours)
    # Without DownloadedAt Trivy takes the database for damaged and fetches another.
    dates = {"UpdatedAt": built, "DownloadedAt": built, "NextUpdate": built + timedelta(hours=24)}
    files = {
        "trivy.db": BoltWriter().file(build_tree(advisories)),
        "metadata.json": _record(Version=2, **{name: value.isoformat() for name, value in dates.items()}),
    }
    folder = cache / "db"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if archive is not None:
        with tarfile.open(archive, "w:gz") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(data), int(built.timestamp())
                tar.addfile(member, io.BytesIO(data))
    return folder / "trivy.db"


class BoltWriter:
    """Writes a whole tree of nested dicts at once."""

    def __init__(self) -> None:
        self.pages: list[bytes] = []  # finished data pages, in file order
        self.next = 3  # 0, 1: meta; 2: freelist

    def file(self, tree: Tree) -> bytes:
        root = self._bucket(tree, top=True)
        head = b""
        for transaction in (0, 1):  # two copies, both valid
            meta = struct.pack("<IIII", 0xED0CDAED, 2, PAGE, 0) + root
            meta += struct.pack("<QQQ", 2, self.next, transaction)
            meta += struct.pack("<Q", fnv1a(meta))
            head += _page(transaction, META, 0, meta).ljust(PAGE, b"\0")
        head += _page(2, FREELIST, 0, b"").ljust(PAGE, b"\0")  # nothing free
        return head + b"".join(self.pages)

    def _add(self, kind: int, items: Sequence[Item]) -> int:
        """Store one node; return its page."""
        number, count = self.next, -(-_size(items) // PAGE)
        raw = _page(number, kind, len(items), _node_body(kind, items), count - 1)
        self.pages.append(raw.ljust(count * PAGE, b"\0"))
        self.next += count
        return number

    def _bucket(self, tree: Tree, *, top: bool = False) -> bytes:
        """Store a bucket; return the value that its parent keeps for it."""
        items: list[Item] = [
            (1, key, self._bucket(value)) if isinstance(value, dict) else (0, key, value)
            for key, value in sorted(tree.items())  # Bolt: bytes order
        ]
        nested = any(flag for flag, _, _ in items)
        if not (top or nested) and _size(items) <= PAGE // 4:  # small: inline
            return struct.pack("<QQ", 0, 0) + _page(0, LEAF, len(items), _node_body(LEAF, items))
        kind = LEAF
        while True:  # leaves first, then up
            level = [(self._add(kind, run), run[0][1] if run else b"", b"") for run in _fill_pages(items)]
            if len(level) == 1:
                return struct.pack("<QQ", level[0][0], 0)
            kind, items = BRANCH, level


def build_tree(advisories: Sequence[dict[str, Any]]) -> Tree:
    """Buckets: target → package → id, vulnerability → id, data-source."""
    tree: Tree = {b"data-source": {}, b"vulnerability": {}}
    details: dict[str, dict[str, Any]] = {}
    for advisory in advisories:
        target = advisory["target"]
        distribution = target.split()[0] if " " in target else ""
        source = advisory.get("severity_source", "nvd" if distribution else "ghsa")
        level = SEVERITIES.index(advisory["severity"])
        bucket, package, entry = _entry(advisory, distribution, source)
        name = distribution or "GitHub Security Advisory " + target
        tree[b"data-source"][bucket] = _record(ID=distribution or "ghsa", Name=name, URL="https://example.invalid/")
        tree.setdefault(bucket, {}).setdefault(package, {})[advisory["id"].encode()] = entry
        detail = details.setdefault(advisory["id"], {
            "Title": advisory.get("title"), "Description": advisory.get("description"),
            "References": advisory.get("references"), "Severity": advisory["severity"],
            "VendorSeverity": {}, "CVSS": {},
        })  # fmt: skip
        detail["VendorSeverity"][source] = level
        if "cvss" in advisory:
            detail["CVSS"][source] = {"V3Score": advisory["cvss"], "V3Vector": advisory.get("cvss_vector", "")}
        tree[b"vulnerability"][advisory["id"].encode()] = _record(**detail)
    return tree


def fnv1a(data: bytes) -> int:
    """64-bit FNV-1a, the checksum of a meta page."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def _entry(advisory: dict[str, Any], distribution: str, source: str) -> tuple[bytes, bytes, bytes]:
    """The bucket, the package and the record of one advisory."""
    target, package, fixed = advisory["target"], advisory["package"], advisory.get("fixed")
    status = STATUSES.index(advisory.get("status", "unknown"))
    if distribution:
        level = SEVERITIES.index(advisory["severity"]) if source == distribution else 0
        return target.encode(), package.encode(), _record(FixedVersion=fixed, Status=status, Severity=level)
    if target == "pip":  # Trivy looks up this form
        package = re.sub(r"[-_.]+", "-", package).lower()
    ranges = advisory.get("vulnerable") or ["<" + fixed if fixed else ">=0"]
    record = _record(VulnerableVersions=ranges, Status=status, PatchedVersions=[fixed] if fixed else [])
    return f"{target}::GitHub Security Advisory {target}".encode(), package.encode(), record


def _record(**fields: object) -> bytes:
    """One JSON record, without its empty fields."""
    return json.dumps({key: value for key, value in fields.items() if value}).encode()


def _page(number: int, flags: int, count: int, body: bytes, overflow: int = 0) -> bytes:
    return struct.pack("<QHHI", number, flags, count, overflow) + body


def _node_body(kind: int, items: Sequence[Item]) -> bytes:
    """Elements, then their data."""
    elements, data = b"", b""
    for index, (extra, key, value) in enumerate(items):
        position = HEADER * (len(items) - index) + len(data)
        if kind == LEAF:
            elements += struct.pack("<IIII", extra, position, len(key), len(value))
        else:
            elements += struct.pack("<IIQ", position, len(key), extra)
        data += key + value
    return elements + data


def _size(items: Sequence[Item]) -> int:
    return HEADER + sum(HEADER + len(key) + len(value) for _, key, value in items)


def _fill_pages(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Cut sorted items into runs that fit a page.

    Every run but the last has at least two items (a branch must narrow the tree); longer data overflows.
    """
    run: list[Item] = []
    for item in items:
        if len(run) >= 2 and _size([*run, item]) > PAGE:
            yield run
            run = []
        run.append(item)
    yield run


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("advisories", type=Path, help="JSON list of advisories")
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--tar", type=Path, help="also write this db.tar.gz")
    parser.add_argument("--age-hours", type=float, default=0.0, help="date the database this far back")
    arguments = parser.parse_args()
    advisories = json.loads(arguments.advisories.read_text())
    path = write_database(arguments.cache_dir, advisories, age_hours=arguments.age_hours, archive=arguments.tar)
    print(f"{len(advisories)} advisories -> {path}")


if __name__ == "__main__":
    _main()
