"""The layer of a runtime with the loader that verifies a model while vLLM loads it, and with what it imports of ours.

It is a layer of its own, on top of the wheels: a change of it transfers kilobytes, and assembles no runtime anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from containers.image.layers import FileLayer, Member, archive, plain_files
from registry.digests import digest_file
from registry.manifest import FileRecord
from registry.served_files import LIST, ServedFiles

NAME = "slipway_loader"
_CHECKOUT = Path(__file__).parents[2]
_RUNTIMES = Path(__file__).parent.parent / "runtimes"
# What the loader imports of ours. They lie beside it without their packages' `__init__`, which import far more.
_IMPORTED = (
    "pipeline/compatibility/safetensors_headers.py",
    *(f"registry/{name}.py" for name in (
        "atomic_write", "bounded_json", "certificates", "digests", "errors", "manifest", "policy", "provenance",
        "served_files", "signing", "sigstore_bundle", "verdict", "verify", "walk",
    )),
)  # fmt: skip
_INSTALLED = {
    "METADATA": "Metadata-Version: 2.1\nName: slipway-loader\nVersion: 1\n",
    "entry_points.txt": f"[vllm.general_plugins]\n{NAME} = {NAME}:register\n",
}


def loader_layer(python: str) -> FileLayer:
    """Return the layer for a runtime with this Python (``python3.12``)."""
    packages = f"opt/venv/lib/{python}/site-packages"
    files = {path: _CHECKOUT / path for path in _IMPORTED}
    files |= {f"{NAME}/{path.name}": path for path in (_RUNTIMES / NAME).glob("*.py")}
    members = [Member(f"{packages}/{name}", path.read_bytes()) for name, path in files.items()]
    members += [Member(f"{packages}/{NAME}-1.dist-info/{name}", text.encode()) for name, text in _INSTALLED.items()]
    return archive(members)


def list_of_files(members: Iterable[Member], sha256: Mapping[Path, str]) -> Member:
    """Return the list by which the loader knows these files of a container; ``sha256`` has the known digests."""
    files = {}
    for member in members:
        if isinstance(member.content, bytes):
            digest = hashlib.sha256(member.content).hexdigest()
        else:
            digest = sha256.get(member.content) or digest_file(member.content)
        files[member.name] = FileRecord(sha256=digest, size=member.size)
    return Member(LIST, ServedFiles(files=files).to_bytes())


def list_of_layers(layers: Sequence[FileLayer]) -> FileLayer:
    """Return the layer of an image with the list of the files in these layers, all that it may serve."""
    known = {path: digest for layer in layers for path, digest in layer.sha256.items()}
    return archive([list_of_files([member for layer in layers for member in layer.members], known)])


@contextlib.contextmanager
def with_list(mounts: Mapping[Path, str], home: Path, sha256: Mapping[Path, str]) -> Iterator[dict[Path, str]]:
    """Add to what is mounted into a runtime, path → path in the container, the list of all its files."""
    members: list[Member] = []
    for path, place in mounts.items():
        inside = place.removeprefix("/")
        members += plain_files(path, inside) if path.is_dir() else [Member(inside, path)]
    listed = list_of_files(members, sha256)
    assert isinstance(listed.content, bytes)  # noqa: S101 - it is made above
    (home / "scratch").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home / "scratch", prefix="files-") as folder:
        path = Path(folder) / Path(LIST).name
        path.write_bytes(listed.content)
        path.chmod(0o644)  # the container's user reads it
        yield {**mounts, path: f"/{LIST}"}
