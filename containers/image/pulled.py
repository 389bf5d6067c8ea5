"""Documents of an image from a registry: manifest, index of platforms, configuration. They are validated.

The formats are the OCI Image Specification 1.1 and Docker's schema 2, which differ only in media types. Only the parts
used here are read.
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
# No image has more layers: Docker's limit is 127.
_MOST_LAYERS = 500
# Media types of layers, and OCI's names for them.
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
    """The platform of an image in an index."""

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
        """The layer's media type in OCI's terms; ``ImageError`` for other compressions and for encrypted layers."""
        found = _LAYERS.get(self.media_type)
        if found is None:
            raise ImageError(f"the layer {self.digest} has the type `{self.media_type[:100]}`, which is not supported")
        return found


class ImageManifest(_Form):
    """An image's manifest: its configuration, and its layers from the bottom up."""

    config: Descriptor
    layers: Annotated[list[Descriptor], Field(max_length=_MOST_LAYERS)]


class Index(_Form):
    """An index: images for several platforms under one name."""

    manifests: Annotated[list[Descriptor], Field(max_length=_MOST_LAYERS)]


class _Root(_Form):
    diff_ids: Annotated[list[Digest], Field(max_length=_MOST_LAYERS)]


class _Settings(_Form):
    model_config = ConfigDict(extra="allow")

    env: Annotated[list[str] | None, Field(alias="Env")] = None
    labels: Annotated[dict[str, str] | None, Field(alias="Labels")] = None


class Configuration(_Form):
    """An image's configuration: ``config`` has its settings, ``rootfs`` the digests of the layers' tars."""

    config: _Settings | None = None
    rootfs: _Root

    @property
    def settings(self) -> dict[str, Any]:
        """The image's settings, as in the document."""
        return {} if self.config is None else self.config.model_dump(by_alias=True, exclude_unset=True)


def read_manifest(data: bytes, what: str) -> ImageManifest | Index:
    """Parse a manifest or an index; ``what`` names it in messages.

    Raises:
        ImageError: it is neither, or too large or too deeply nested.
    """
    document = _document(data, what)
    if isinstance(document, dict) and "manifests" in document:
        return _read(Index, document, what)
    return _read(ImageManifest, document, what)


def read_configuration(data: bytes, what: str) -> Configuration:
    """Parse an image's configuration; ``ImageError`` if it is not valid. ``what`` names it in messages."""
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
        raise ImageError(f"{what} is not a valid OCI document: {first_problem(error)}") from error
