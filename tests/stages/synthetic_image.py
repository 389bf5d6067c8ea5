"""A small image for scans: a Debian 12 by its files, a few packages, and what a test puts beside them."""

from __future__ import annotations

import io
import tarfile
import uuid
from collections.abc import Mapping

import docker

FILES = {
    "etc/os-release": 'ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
    "etc/debian_version": "12.8\n",
    "var/lib/dpkg/status": "".join(
        f"Package: {name}\nStatus: install ok installed\nSource: {source}\nVersion: {version}\n"
        "Architecture: amd64\nMaintainer: none\nDescription: none\n\n"
        for name, source, version in (
            ("libssl3", "openssl", "3.0.15-1~deb12u1"),
            ("openssl", "openssl", "3.0.15-1~deb12u1"),
            ("tar", "tar", "1.34+dfsg-1.2+deb12u1"),
        )
    ),
    "usr/lib/python3/dist-packages/idna-3.6.dist-info/METADATA": "Metadata-Version: 2.1\nName: idna\nVersion: 3.6\n\n",
}


def make_image(
    client: docker.DockerClient, repository: str, extra: Mapping[str, str] | None = None, user: str = "65534"
) -> str:
    """Import the files as an image that runs as ``user``, with a tag of its own in ``repository``; give its id."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, text in {**FILES, **(extra or {})}.items():
            data = text.encode()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
    tag = uuid.uuid4().hex[:8]
    client.api.import_image_from_data(archive.getvalue(), repository=repository, tag=tag, changes=[f"USER {user}"])
    return str(client.images.get(f"{repository}:{tag}").id)
