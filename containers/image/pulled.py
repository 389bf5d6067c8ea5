"""What a registry says an image is: manifest, index of platforms, configuration; each is in its form, or refused.

The forms are those of the OCI Image Specification 1.1 and of Docker's schema 2, which differ in media types alone. What
is read is a part of them; the rest is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from containers.errors import ImageError
from containers.image.blobs import GZIP, PLAIN
from containers.image.distribution import DOCUMENT
from registry.bounded_json import DocumentError, read_json
from registry.errors import first_problem

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
# No image has more layers: Docker takes 127.
_MOST_LAYERS = 500
# Media types of layers, and what they are called here.
_LAYERS = {
    PLAIN: PLAIN,
    GZIP: GZIP,
    "application/vnd.docker.image.rootfs.diff.tar": PLAIN,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": GZIP,
}


class _Form(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


_T = TypeVar("_T", bound=_Form)


class Platform(_Form):
    """What an image of an index runs on."""

    os: str
    architecture: str


class Descriptor(_Form):
    """A blob or a manifest, by its digest; ``size`` in bytes."""

    digest: Digest
    size: Annotated[int, Field(ge=0, le=1 << 40)]
    media_type: Annotated[str, Field(alias="mediaType")] = ""
    platform: Platform | None = None

    @property
    def layer_type(self) -> str:
        """OCI's media type of a layer; ``ImageError`` for one that is compressed in another way, or encrypted."""
        found = _LAYERS.get(self.media_type)
        if found is None:
            raise ImageError(f"the layer {self.digest} is of the type `{self.media_type[:100]}`, which is not read")
        return found


class ImageManifest(_Form):
    """An image: its configuration, and its layers from the bottom up."""

    config: Descriptor
    layers: Annotated[list[Descriptor], Field(max_length=_MOST_LAYERS)]


class Index(_Form):
    """Images of several platforms under one name."""

    manifests: Annotated[list[Descriptor], Field(max_length=_MOST_LAYERS)]


class _Root(_Form):
    diff_ids: Annotated[list[Digest], Field(max_length=_MOST_LAYERS)]


class _Settings(_Form):
    model_config = ConfigDict(extra="allow")

    env: Annotated[list[str] | None, Field(alias="Env")] = None
    labels: Annotated[dict[str, str] | None, Field(alias="Labels")] = None


class Configuration(_Form):
    """An image's configuration: ``config`` is what it runs with, ``rootfs`` has the digests of the layers' tars."""

    config: _Settings | None = None
    rootfs: _Root

    @property
    def settings(self) -> dict[str, Any]:
        """What it runs with, as it stands in the document."""
        return {} if self.config is None else self.config.model_dump(by_alias=True, exclude_unset=True)


def read_manifest(data: bytes, what: str) -> ImageManifest | Index:
    """Read the manifest of ``what``; an index where it lists manifests.

    Raises:
        ImageError: it is neither, or larger or deeper than any is.
    """
    document = _document(data, what)
    if isinstance(document, dict) and "manifests" in document:
        return _read(Index, document, what)
    return _read(ImageManifest, document, what)


def read_configuration(data: bytes, what: str) -> Configuration:
    """Read the configuration of ``what``; ``ImageError`` where it is none."""
    return _read(Configuration, _document(data, what), what)


def _document(data: bytes, what: str) -> object:
    try:
        return read_json(data, DOCUMENT)
    except DocumentError as error:
        raise ImageError(f"{what} can't be read: {error}") from error


def _read(form: type[_T], document: object, what: str) -> _T:
    try:
        return form.model_validate(document)
    except ValidationError as error:
        raise ImageError(f"{what} is not of OCI's form: {first_problem(error)}") from error
