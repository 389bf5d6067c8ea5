"""The base of an image: an image pulled by digest, or one made here of Debian packages with mmdebstrap.

Its layers and settings are in ``$SLIPWAY_HOME/images``, so that images can be assembled and pushed without
the engine. It is loaded into the engine to run commands in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker

from containers.engine.engine import install_packages
from containers.errors import EngineError, ImageError
from containers.image import loading, packages
from containers.image.blobs import Blob, BlobStore
from containers.image.distribution import DOCUMENT, Registry, parse
from containers.image.layers import EPOCH, normalized_file
from containers.image.oci import OciImage
from containers.image.profile import DebianRecipe, RuntimeProfile
from containers.image.pulled import ImageManifest, Index, Platform, read_configuration, read_manifest
from registry.atomic_write import write_atomically
from registry.digests import canonical_json, digest_of
from registry.progress import Progress

REPOSITORY = "slipway-base"
RECIPE_LABEL = "slipway.base.recipe"
# Files of packages that a container does not need. Copyright files stay, because licences require them.
_NO_DOCUMENTATION = (
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
)
# The base must not depend on the machine that made it (host name, resolver, mirror). Bytecode compiled while packages
# are configured contains times. So one process compiles it again in a fixed order: the bytes are the same each time.
_FORGET_THE_MACHINE = (
    'rm -rf "$1/etc/hostname" "$1/etc/resolv.conf" "$1/etc/apt/sources.list" "$1/etc/apt/sources.list.d" '
    '"$1/var/lib/apt/lists" "$1/var/cache" "$1/var/log"; mkdir -p "$1/var/cache" "$1/var/log"; '
    'find "$1/usr" -name __pycache__ -prune -exec rm -rf {} +; '
    'if [ -x "$1/usr/bin/python3" ]; then PYTHONHASHSEED=0 chroot "$1" /usr/bin/python3 -m compileall -qq '
    "--invalidation-mode unchecked-hash /usr/lib/python3 /usr/lib/python3.*; fi || true"
)
_KEPT = ("digest", "size", "diff_id", "media_type")
_ENVIRONMENT = ("PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8")


@dataclass(frozen=True)
class BaseImage:
    """A base that is stored here and loaded into the engine.

    ``reference`` is its id in the engine. ``digest`` identifies the content: the manifest's digest of a pulled image,
    or the layer's digest of one made here, so that the same packages give the same digest. ``settings`` are the
    ``config`` of its image configuration.
    """

    reference: str
    digest: str
    name: str
    layers: tuple[Blob, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def store_of(home: Path) -> BlobStore:
    """Return the home's store of image layers."""
    return BlobStore(home / "images")


def ensure_base(client: docker.DockerClient, profile: RuntimeProfile, home: Path, progress: Progress) -> BaseImage:
    """Return the profile's base: from the store, or else pulled by digest or made here.

    Raises:
        ImageError: it can't be pulled or made; the message says why.
    """
    store = store_of(home)
    if profile.base.debian is not None:
        return _made(client, profile.base.debian, home, store, progress)
    base = _loaded(client, _fetched(profile.base.image or "", store, progress), progress)
    return _prepared(client, profile, base, home, store, progress) if profile.base.packages else base


def given_base(client: docker.DockerClient, reference: str, home: Path) -> BaseImage:
    """Return an image of the engine as a base, unchanged.

    Raises:
        ImageError: the engine has no such image.
    """
    settings, layers = loading.taken_out(client, reference, store_of(home))
    image_id = str(client.images.get(reference).id)
    return BaseImage(image_id, _layers_digest(layers), reference, tuple(layers), settings)


def _fetched(reference: str, store: BlobStore, progress: Progress) -> BaseImage:
    """Pull an image by digest into the store; each blob's digest is checked."""
    host, repository, digest = parse(reference)
    record = _remembered(store, digest.removeprefix("sha256:"))
    if record is not None:
        return record
    progress(f"fetching the base {reference}")
    with Registry(host) as registry:
        manifest = _platform(registry, repository, digest, reference)
        data = b"".join(registry.blob(repository, manifest.config.digest, min(manifest.config.size, DOCUMENT.bytes)))
        if digest_of(data) != manifest.config.digest:
            raise ImageError(
                f"the configuration of {reference} should be {manifest.config.digest}, but the registry sent "
                f"{digest_of(data)}"
            )
        configuration = read_configuration(data, f"the configuration of {reference}")
        diff_ids = configuration.rootfs.diff_ids
        if len(diff_ids) != len(manifest.layers):
            raise ImageError(
                f"the manifest of the base {reference} has {len(manifest.layers)} layers, but its configuration "
                f"{len(diff_ids)}"
            )
        layers = []
        for layer, diff_id in zip(manifest.layers, diff_ids, strict=True):
            media_type = layer.layer_type
            if not store.has(layer.digest, layer.size):
                store.add(registry.blob(repository, layer.digest, layer.size), expected=layer.digest)
            layers.append(store.layer(layer.digest, layer.size, diff_id, media_type))
    base = BaseImage("", digest, reference, tuple(layers), configuration.settings)
    _remember(store, digest.removeprefix("sha256:"), base)
    return base


def _platform(registry: Registry, repository: str, digest: str, reference: str) -> ImageManifest:
    """The manifest with a digest; for an index, the one for Linux on x86-64."""
    found = _manifest(registry, repository, digest, reference)
    if isinstance(found, Index):
        wanted = Platform(os="linux", architecture="amd64")
        named = next((entry.digest for entry in found.manifests if entry.platform == wanted), None)
        found = found if named is None else _manifest(registry, repository, named, reference)
    if isinstance(found, Index):
        raise ImageError(f"the base {reference} has no image for linux/amd64")
    return found


def _manifest(registry: Registry, repository: str, digest: str, reference: str) -> ImageManifest | Index:
    found = registry.manifest(repository, digest)
    if found is None:
        raise ImageError(f"the base {reference} is not in its registry")
    return read_manifest(found[0], f"the base {reference}")


def _prepared(
    client: docker.DockerClient, profile: RuntimeProfile, base: BaseImage, home: Path, store: BlobStore,
    progress: Progress,
) -> BaseImage:  # fmt: skip
    """Add the profile's packages, of the distribution's snapshot, as a further layer."""
    key = digest_of(canonical_json([base.digest, profile.base.packages, profile.base.snapshot, packages.VERSION]))
    record = _remembered(store, key.removeprefix("sha256:"))
    if record is None:
        fetched = packages.fetch(client, profile, base.reference, home, progress)
        layer = store.plain(packages.installed(client, profile, base.reference, fetched, home, progress))
        record = BaseImage("", base.digest, base.name, (*base.layers, layer), base.settings)
        _remember(store, key.removeprefix("sha256:"), record)
    return _loaded(client, record, progress)


def _made(
    client: docker.DockerClient, recipe: DebianRecipe, home: Path, store: BlobStore, progress: Progress
) -> BaseImage:
    """Make a base of Debian packages. It is stored under its recipe, because its digest is only known afterwards."""
    covered = [recipe.model_dump(mode="json"), EPOCH, _NO_DOCUMENTATION, _FORGET_THE_MACHINE, _ENVIRONMENT]
    key = hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()
    record = _remembered(store, key)
    if record is None:
        record = _lent(client, recipe, key, store) or _bootstrapped(recipe, key, home, store, progress)
        _remember(store, key, record)
    return _loaded(client, record, progress, f"{REPOSITORY}:{recipe.suite}-{key[:12]}")


def _lent(client: docker.DockerClient, recipe: DebianRecipe, key: str, store: BlobStore) -> BaseImage | None:
    """Return the base from the engine, if another home has made it."""
    tag = f"{REPOSITORY}:{recipe.suite}-{key[:12]}"
    if loading.existing(client, tag, {RECIPE_LABEL: key}) is None:
        return None
    _, layers = loading.taken_out(client, tag, store)
    return _debian(recipe, key, layers)


def _bootstrapped(recipe: DebianRecipe, key: str, home: Path, store: BlobStore, progress: Progress) -> BaseImage:
    _need_mmdebstrap(recipe, progress)
    progress(f"making a base image of Debian {recipe.suite} with {', '.join(recipe.packages)}")
    scratch = home / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="base-") as folder:
        archive = Path(folder) / "base.tar"
        _mmdebstrap(recipe, archive, Path(folder), progress)
        return _debian(recipe, key, [store.plain(normalized_file(archive))])


def _debian(recipe: DebianRecipe, key: str, layers: Sequence[Blob]) -> BaseImage:
    settings = {"Env": list(_ENVIRONMENT), "Labels": {RECIPE_LABEL: key}}
    return BaseImage("", _layers_digest(layers), f"debian:{recipe.suite} by mmdebstrap", tuple(layers), settings)


def _loaded(client: docker.DockerClient, base: BaseImage, progress: Progress, tag: str | None = None) -> BaseImage:
    """Load the base into the engine if necessary, and return it with its id there."""
    tag = tag or f"{REPOSITORY}:{base.digest.removeprefix('sha256:')[:12]}-{len(base.layers)}"
    image = OciImage(base.settings, base.layers, tuple("the base" for _ in base.layers), {})
    found = loading.existing(client, tag, {})
    if found is None or found.id != image.config_digest:
        progress(f"loading the base {base.name} into the engine")
        found = loading.load(client, image, tag)
    return BaseImage(str(found.id), base.digest, base.name, base.layers, base.settings)


def _remembered(store: BlobStore, key: str) -> BaseImage | None:
    """The base stored under a key, if all its layers are still there."""
    try:
        record = json.loads((store.root / "bases" / f"{key}.json").read_text())
    except FileNotFoundError:
        return None
    layers = tuple(store.layer(*(each[name] for name in _KEPT)) for each in record["layers"])
    if not all(store.has(layer.digest, layer.size) for layer in layers):
        return None
    return BaseImage("", record["digest"], record["name"], layers, record["settings"])


def _remember(store: BlobStore, key: str, base: BaseImage) -> None:
    layers = [{name: getattr(layer, name) for name in _KEPT} for layer in base.layers]
    path = store.root / "bases" / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"name": base.name, "digest": base.digest, "settings": base.settings, "layers": layers}
    write_atomically(path, canonical_json(record))


def _need_mmdebstrap(recipe: DebianRecipe, progress: Progress) -> None:
    wanted = [] if shutil.which("mmdebstrap") else ["mmdebstrap"]
    if not Path("/usr/share/keyrings/debian-archive-keyring.gpg").exists():
        wanted.append("debian-archive-keyring")
    if not wanted:
        return
    try:
        install_packages(wanted, progress)
    except EngineError as error:
        raise ImageError(f"a base of Debian {recipe.suite} can't be made here: {error}") from error


def _mmdebstrap(recipe: DebianRecipe, archive: Path, scratch: Path, progress: Progress) -> None:
    command = ["mmdebstrap", "--variant=essential", f"--include={','.join(recipe.packages)}", "--architectures=amd64"]
    command += [f"--dpkgopt={option}" for option in _NO_DOCUMENTATION]
    command += [f"--customize-hook={_FORGET_THE_MACHINE}", recipe.suite, str(archive)]
    command += [str(path) for path in sources_of(recipe.suite, apt_sources())]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH), "TMPDIR": str(scratch), "LC_ALL": "C.UTF-8"}
    output: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            for line in process.stdout or ():
                output.append(line.strip())
                if line.startswith("I: ") and line.rstrip().endswith("..."):
                    progress(f"mmdebstrap: {line[3:].strip()}")
        except BaseException:  # including Ctrl-C: the child cleans up after SIGTERM
            process.terminate()
            process.wait()
            raise
    if process.returncode != 0:
        wrong = (
            [line for line in output if line.startswith("E: ") or "No space left" in line] or output or ["no output"]
        )
        raise ImageError(f"mmdebstrap failed ({shlex.join(command[:3])} …): {wrong[0][:300]}")


def apt_sources() -> list[Path]:
    """Return this machine's files of package sources."""
    folder = Path("/etc/apt/sources.list.d")
    return [Path("/etc/apt/sources.list"), *sorted(folder.glob("*.sources")), *sorted(folder.glob("*.list"))]


def sources_of(suite: str, files: Iterable[Path]) -> list[Path]:
    """Return those of ``files`` that offer Debian's ``suite``, so that the base uses the machine's mirror too.

    Empty on a machine of another release: mmdebstrap then uses Debian's default. Files of third parties are skipped,
    because they have other suites or components.
    """
    found = []
    for path in files:
        if not path.is_file():
            continue
        text = "\n".join(line for line in path.read_text(errors="replace").splitlines() if not line.startswith("#"))
        words = text.split()
        if suite in words and "main" in words and "/debian" in text:
            found.append(path)
    return found


def _layers_digest(layers: Sequence[Blob]) -> str:
    """Return a digest that depends on the layers only: that of the single layer, or of the list of all."""
    if len(layers) == 1:
        return layers[0].diff_id
    return "sha256:" + hashlib.sha256("\n".join(layer.diff_id for layer in layers).encode()).hexdigest()
