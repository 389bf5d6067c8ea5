"""Sources of weights: resolve a revision, pull its files, check each of them, and compare them with the lock.

A source is a folder, ``file:FOLDER``, or a model on a hub, ``hf://ORG/NAME[@REVISION]``. Only safetensors, JSON and
tokenizer files at its top level are pulled. Pickles can run code when they are loaded: a folder with pickles is
refused, and of a hub's model only the safetensors are pulled. Code that comes with a model is never run. A lock
(`pipeline.sources.lock`) pins the files of the first successful pull.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline.compatibility.backends import is_supported
from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.safetensors_headers import (
    INDEX,
    INDEX_BOUNDS,
    SINGLE,
    HeaderError,
    Tensor,
    header_length,
    parse_header,
    read_index,
    read_model,
    weight_files,
)
from pipeline.errors import SourceError
from pipeline.sources.file_digests import digests_of
from pipeline.sources.lock import Lock, LockedFile, portable, read_lock, write_lock
from registry import untrusted
from registry.bounded_json import Bounds, DocumentError, read_json
from registry.digests import digest_json
from registry.errors import UntrustedFileError
from registry.file_systems import set_mode
from registry.progress import Progress
from registry.walk import entries

if TYPE_CHECKING:
    from pipeline.sources.hub import Hub


# The file of a home in which digests of folders' files are remembered.
DIGESTS = "digests.json"

_CHUNK = 4 * 1024 * 1024
# A tokenizer of 262,144 words takes 35 MB and two million values.
_DOCUMENT = Bounds(bytes=128 << 20, values=8_000_000, depth=64)
# One request reads most headers completely: a file of 5 GB has some hundred tensors, described in ten kilobytes.
_FIRST_READ = 128 * 1024
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Names of blobs in the Hugging Face cache: git's digest, or the sha256 of a large file.
_BLOB = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_HUB = re.compile(r"hf://(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>.+))?")
# A file name at the top level: no other folder, no control character, not too long for file systems.
_PLAIN = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,200}")
_TOKENIZER = re.compile(r"(tokenizer|spiece|sentencepiece|.+\.bpe)\.model|(merges|vocab)\.txt|.+\.(jinja|tiktoken)")
# Supported forms of a tokenizer, each with all of its files; other forms need sentencepiece or tiktoken.
_TOKENIZER_FORMS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
_PICKLE = re.compile(r".+\.(bin|pt|pth|ckpt|pkl|pickle|joblib)")
# Linux's ioctl that makes two files share their blocks (btrfs, XFS).
_FICLONE = 0x40049409


@dataclass(frozen=True)
class SourceFile:
    """One file to pull, with the digests that the lock or the hub states (see `hub.HubFile`)."""

    path: str
    size: int
    sha256: str | None = None
    blob: str | None = None


@dataclass(frozen=True)
class Contents:
    """What a source holds: which of its files are pulled, and what must be true of them.

    ``weights`` names the files with the weights, from all names and the start of an index; ``is_taken`` says whether a
    file is pulled, given those. ``require`` checks the names that are taken, ``check`` the pulled files. All three that
    check raise ``SourceError``.
    """

    weights: Callable[[str, list[str], Callable[[], bytes]], list[str]]
    is_taken: Callable[[str, Collection[str]], bool]
    require: Callable[[str, list[str]], None]
    check: Callable[[Path, Progress], None]


@dataclass(frozen=True)
class ResolvedSource:
    """The exact files to pull. ``revision`` is a commit; None for a folder, which is identified by its files.

    ``left_out`` names the files that are not pulled. A folder's digests are remembered in the file ``memory``.
    """

    uri: str
    revision: str | None
    files: tuple[SourceFile, ...]
    left_out: tuple[str, ...]
    hub: Hub | None = None
    lock: Lock | None = None
    memory: Path | None = None
    contents: Contents = field(default_factory=lambda: MODEL)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the content: the commit, or the digest over a folder's files."""
        return self.revision or digest_json(self.sha256)

    @cached_property
    def sha256(self) -> dict[str, str]:
        """The digests of a folder's files when they were first requested: path → 64 hex digits."""
        folder = Path(self.uri.removeprefix("file:"))
        places = {file.path: Path(*_place(folder, file.path)) for file in self.files}
        found = digests_of(places.values(), self.memory)
        return {name: found[place] for name, place in places.items()}

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(file.size for file in self.files)


def resolve(
    uri: str,
    revision: str | None = None,
    *,
    endpoint: str = "https://huggingface.co",
    token: str | None = None,
    lock: Lock | None = None,
    memory: Path | None = None,
    contents: Contents | None = None,
) -> ResolvedSource:
    """List the files of ``uri`` at ``revision`` (a commit, tag or branch; default ``main``) without pulling them.

    Under a ``lock`` a hub is not asked, because the lock lists the files. ``memory`` is where the digests of a folder's
    files are remembered (`pipeline.sources.file_digests`). ``contents`` is what it holds, by default a `MODEL`.

    Raises:
        SourceError: the source does not exist, can't be reached, holds refused files, or differs from the lock.
    """
    contents = contents or MODEL
    if uri.startswith("file:"):
        if revision is not None:
            raise SourceError(f"`revision` does not apply to {uri}: a folder has no revisions; remove it")
        return _resolve_folder(uri, lock, memory, contents)
    match = _HUB.fullmatch(uri)
    if match is None:
        raise SourceError(f"can't pull from `{uri}`: expected file:FOLDER or hf://ORG/NAME[@REVISION]")
    named = match["revision"]
    if named and revision and named != revision:
        raise SourceError(f"`uri` names @{named}, but `revision` is {revision}: remove one of them")
    from pipeline.sources.hub import Hub  # noqa: PLC0415 - the hub's client takes a third of a second to import

    return _resolve_hub(match["repository"], named or revision or "main", Hub(endpoint, token), lock, contents)


def pull(resolved: ResolvedSource, folder: Path, downloads: Path, progress: Progress) -> dict[str, str]:
    """Pull the source's files into the empty ``folder``, check each, and return their sha256 by path.

    Downloads are kept in ``downloads`` until they are complete, so that an interrupted pull continues where it stopped.

    Raises:
        SourceError: files differ from the lock or the hub's list, are damaged, or need code to run; lists all of them.
    """
    for name in resolved.left_out:
        progress(f"not pulled: {name}")
    place = _copy_folder if resolved.hub is None else _download
    digests = place(resolved, folder, downloads, progress)
    resolved.contents.check(folder, progress)
    progress(f"pulled {len(digests)} files, {resolved.bytes / 1e6:.1f} MB")
    return digests


def hold_to_lock(path: Path, resolved: ResolvedSource, sha256: Mapping[str, str]) -> None:
    """Compare the pulled files (path → sha256) with the lock in ``path``; write the lock if there is none.

    Raises:
        SourceError: listing all different, missing and extra files.
    """
    lock = read_lock(path)
    if lock is None:
        sizes = {file.path: file.size for file in resolved.files}
        files = {name: LockedFile(size=sizes[name], sha256=digest) for name, digest in sorted(sha256.items())}
        write_lock(Lock(path=path, uri=portable(resolved.uri, path), revision=resolved.revision, files=files))
    else:
        lock.refuse_difference(sha256)


def revision_of(resolved: ResolvedSource, sha256: Mapping[str, str]) -> str:
    """The revision that a release records: a hub's commit; for a folder the digest over its files' digests."""
    return resolved.revision or digest_json(dict(sha256))


def public_uri(uri: str) -> str:
    """Return the URI as it is published: of a local folder its name alone, since its path is private."""
    return f"file:{Path(uri.removeprefix('file:')).name}" if uri.startswith("file:") else uri


def read_header(resolved: ResolvedSource, file: SourceFile) -> dict[str, Tensor]:
    """Read the header of a safetensors file on a hub.

    Raises:
        SourceError: the hub does not answer.
        HeaderError: the header is not valid.
    """
    path = Path(file.path)
    first = read_range(resolved, file.path, 0, min(_FIRST_READ, file.size))
    if len(first) < 8:
        raise HeaderError(f"{path.name}: a file of {len(first)} bytes is not a safetensors file")
    length = header_length(first, path, file.size)
    if len(first) < 8 + length:
        first += read_range(resolved, file.path, len(first), 8 + length - len(first))
    if len(first) < 8 + length:
        raise HeaderError(f"{path.name}: the hub sent only a part of the header: try again")
    return parse_header(first[8 : 8 + length], path, file.size)


def read_range(resolved: ResolvedSource, name: str, start: int, length: int) -> bytes:
    """Read a part of a file on a hub.

    Raises:
        SourceError: the hub does not answer.
    """
    hub, commit = resolved.hub, resolved.revision
    if hub is None or commit is None:
        raise SourceError(f"{resolved.uri} is not a model on a hub")
    return hub.read(resolved.uri.removeprefix("hf://"), commit, name, start=start, length=length)


def missing_weights(uri: str, names: list[str], wanted: str) -> SourceError:
    """Return the error of a source that has no safetensors, perhaps only pickles."""
    if pickles := [name for name in names if _PICKLE.fullmatch(name)]:
        return SourceError(
            f"{uri} has no safetensors, only {_listed(pickles)}: a pickle can run code when it is loaded; "
            "choose a revision with safetensors, or convert it"
        )
    return SourceError(f"{uri} has no {wanted}: it holds {_listed(names) if names else 'nothing'}")


def _visible(uri: str, folder: Path) -> list[str]:
    """Return the paths of a folder's files, sorted and without hidden ones."""

    def refuse(name: str, why: str) -> None:
        if not _hidden(Path(name)):
            raise SourceError(f"{uri} can't be used: `{name}`: {why}")

    found = [name for name, _ in entries(folder, refuse) if not _hidden(Path(name))]
    return sorted(found, key=lambda name: Path(name).parts)


def _resolve_folder(uri: str, lock: Lock | None, memory: Path | None, contents: Contents) -> ResolvedSource:
    folder = Path(uri.removeprefix("file:"))
    if not folder.is_dir():
        raise SourceError(f"there is no folder {folder}")
    names = _visible(uri, folder)
    pickles = [name for name in names if _PICKLE.fullmatch(name)]
    if pickles:
        raise SourceError(
            f"{uri} holds {_listed(pickles)}: a pickle can run code when it is loaded; convert it to safetensors "
            "and remove it from the folder"
        )
    if code := [name for name in names if name.endswith(".py")]:
        raise SourceError(f"{uri} holds {_listed(code)}: code that comes with a model is never run; remove it")
    weights = contents.weights(uri, names, lambda: _read_start(folder, INDEX))
    taken = [name for name in names if contents.is_taken(name, weights)]
    if lock is not None:
        lock.refuse_other(uri, None)
        lock.refuse_difference(dict.fromkeys(taken))
    contents.require(uri, taken)
    return ResolvedSource(
        uri=uri,
        revision=None,
        files=tuple(SourceFile(name, _size(folder, name)) for name in taken),
        left_out=tuple(name for name in names if name not in taken),
        lock=lock,
        memory=memory,
        contents=contents,
    )


def _resolve_hub(repository: str, revision: str, hub: Hub, lock: Lock | None, contents: Contents) -> ResolvedSource:
    uri = f"hf://{repository}"
    if lock is not None:
        lock.refuse_other(uri, revision if _COMMIT.fullmatch(revision) else None)
        if lock.revision is None:
            raise SourceError(f"{lock.path} has no commit: delete it to lock {uri} again")
        files = tuple(SourceFile(name, file.size, file.sha256) for name, file in sorted(lock.files.items()))
        if outside := [file.path for file in files if not contents.is_taken(file.path, _locked_weights(lock))]:
            raise SourceError(
                f"{lock.path} lists {_listed(outside)}, which is never pulled: delete it to lock the source again"
            )
        return ResolvedSource(uri, lock.revision, files, (), hub, lock, contents=contents)
    commit, found = hub.revision(repository, revision)
    names = [file.path for file in found]
    index = lambda: hub.read(repository, commit, INDEX, start=0, length=INDEX_BOUNDS.bytes + 1)  # noqa: E731
    weights = contents.weights(uri, names, index)
    taken = [file for file in found if contents.is_taken(file.path, weights)]
    contents.require(uri, [file.path for file in taken])
    return ResolvedSource(
        uri=uri,
        revision=commit,
        files=tuple(SourceFile(file.path, file.size, file.sha256, file.blob) for file in taken),
        left_out=tuple(
            sorted(name for name in names if not contents.is_taken(name, weights) and not _hidden(Path(name)))
        ),
        hub=hub,
        contents=contents,
    )


def _place(folder: Path, name: str) -> tuple[Path, str]:
    """The real place of a source's file: a folder without links, and the path in it.

    A link may lead to a file in the same folder or, as in the Hugging Face cache, from ``snapshots/REVISION`` to
    ``blobs/DIGEST`` beside it.

    Raises:
        SourceError: a link leads elsewhere, or its target does not exist.
    """
    try:
        root, target = folder.resolve(strict=True), (folder / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise SourceError(f"{folder / name} can't be read: {error}") from error
    if target.is_relative_to(root):
        return root, target.relative_to(root).as_posix()
    blobs = root.parent.parent / "blobs"
    if root.parent.name == "snapshots" and target.parent == blobs and _BLOB.fullmatch(target.name):
        return blobs, target.name
    raise SourceError(
        f"{folder / name} is a link to {target}: links may lead only to the same folder or to the blobs of a Hugging "
        "Face cache; replace the link by a copy of the file"
    )


def _opened(folder: Path, name: str) -> BinaryIO:
    """Open a file of a source; ``SourceError`` if it is not a regular file or is outside of the source."""
    try:
        return untrusted.open_file(*_place(folder, name))
    except (OSError, UntrustedFileError) as error:
        raise SourceError(f"{folder / name} can't be read: {error}") from error


def _size(folder: Path, name: str) -> int:
    with _opened(folder, name) as stream:
        return os.fstat(stream.fileno()).st_size


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _is_taken(name: str, weights: Collection[str]) -> bool:
    if _PLAIN.fullmatch(name) is None:
        return False
    if name.endswith(".json"):
        return name == INDEX or not name.endswith(".index.json")
    return name in weights or _TOKENIZER.fullmatch(name) is not None


def _locked_weights(lock: Lock) -> list[str]:
    return [name for name in lock.files if name.endswith(".safetensors")]


def _read_start(folder: Path, name: str) -> bytes:
    with _opened(folder, name) as stream:
        return stream.read(INDEX_BOUNDS.bytes + 1)


def _weights(uri: str, names: list[str], index: Callable[[], bytes]) -> list[str]:
    """The files that hold the weights; ``SourceError`` if there are none, or only pickles."""
    if not any(name.endswith(".safetensors") for name in names):
        raise missing_weights(uri, names, SINGLE)
    try:
        return weight_files(names, read_index(index()) if INDEX in names else None)
    except HeaderError as error:
        raise SourceError(f"{uri}: {error}") from error


def _require(uri: str, taken: list[str]) -> None:
    """Check that there is a configuration, and a tokenizer in a form that every worker can read."""
    if "config.json" not in taken:
        raise SourceError(f"{uri} has no config.json: it holds {_listed(taken)}")
    if any(all(name in taken for name in form) for form in _TOKENIZER_FORMS):
        return
    found = [name for name in taken if _TOKENIZER.fullmatch(name)]
    raise SourceError(
        f"{uri} has no tokenizer.json"
        + (f", only {_listed(found)}, which no worker can read" if found else "")
        + ": add it, or write it with transformers (`AutoTokenizer.from_pretrained(…).save_pretrained(…)`)"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _copy_folder(resolved: ResolvedSource, folder: Path, _downloads: Path, progress: Progress) -> dict[str, str]:
    source = Path(resolved.uri.removeprefix("file:"))
    digests: dict[str, str] = {}
    for file in resolved.files:
        progress(f"{file.path}: {file.size / 1e6:.1f} MB")
        with _opened(source, file.path) as reader:
            digests[file.path] = _copy(reader, folder / file.path)
    if resolved.lock is not None:
        resolved.lock.refuse_difference(digests)
    if changed := [name for name, digest in digests.items() if digest != resolved.sha256[name]]:
        raise SourceError(f"{resolved.uri}: {_listed(changed)} changed while it was pulled: run again")
    return digests


def _copy(reader: BinaryIO, target: Path) -> str:
    """Copy a file, sharing blocks if possible, and return its sha256; its bytes are read once."""
    total = hashlib.sha256()
    with target.open("w+b") as writer:
        try:
            fcntl.ioctl(writer, _FICLONE, reader.fileno())
        except OSError:
            while chunk := reader.read(_CHUNK):
                total.update(chunk)
                writer.write(chunk)
        else:
            while chunk := writer.read(_CHUNK):
                total.update(chunk)
    set_mode(target, 0o644)
    return total.hexdigest()


def _download(resolved: ResolvedSource, folder: Path, downloads: Path, progress: Progress) -> dict[str, str]:
    hub, commit = resolved.hub, resolved.revision
    if hub is None or commit is None or _COMMIT.fullmatch(commit) is None:
        raise SourceError(f"{resolved.uri} is not a model on a hub")
    repository = resolved.uri.removeprefix("hf://")
    kept = downloads / repository.replace("/", "--") / commit
    kept.mkdir(parents=True, exist_ok=True)
    digests: dict[str, str] = {}
    problems: list[str] = []
    for file in resolved.files:
        part = kept / (file.path + ".part")
        have = part.stat().st_size if part.exists() else 0
        progress(f"{file.path}: {file.size / 1e6:.1f} MB" + (f", {have / 1e6:.1f} of them here" if have else ""))
        hub.download(repository, commit, file.path, size=file.size, part=part, progress=progress)
        digests[file.path], problem = _verify(part, file)
        if problem:
            part.unlink()
            problems.append(problem)
    if resolved.lock is not None:
        resolved.lock.refuse_difference(digests)
    if problems:
        raise SourceError(
            f"{resolved.uri}@{commit}: downloaded files differ from the hub's digests, run again: {'; '.join(problems)}"
        )
    for file in resolved.files:
        shutil.move(kept / (file.path + ".part"), folder / file.path)
        set_mode(folder / file.path, 0o644)
    shutil.rmtree(kept)
    return digests


def _verify(path: Path, file: SourceFile) -> tuple[str, str | None]:
    """Return a file's sha256, and its problem if any. Git's digest of a blob also covers a header with the size."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            sha256.update(chunk)
            blob.update(chunk)
    found = sha256.hexdigest()
    if file.sha256 and found != file.sha256:
        return found, f"{file.path}: sha256 {found}, expected {file.sha256}"
    if file.blob and blob.hexdigest() != file.blob:
        return found, f"{file.path}: git blob {blob.hexdigest()}, expected {file.blob}"
    return found, None


def _check_content(folder: Path, progress: Progress) -> None:
    """Parse headers and configuration: weights complete, an output head, a valid tokenizer, no code to run."""
    problems: list[str] = []
    documents: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            with path.open("rb") as stream:
                documents[path.name] = read_json(stream.read(_DOCUMENT.bytes + 1), _DOCUMENT)
        except DocumentError as error:
            problems.append(f"{path.name} can't be read: {error}")
    config = documents.get("config.json", {})
    if not isinstance(config, dict):
        problems.append("config.json is not a JSON object")
        config = {}
    model = ModelDescription(config, {})
    try:
        model = ModelDescription(config, read_model(folder))
    except HeaderError as error:
        problems += str(error).splitlines()
    if model.lacks_head:
        problems.append(
            "the weights have no output head, and config.json does not tie it to the embedding: weights are missing"
        )
    if "tokenizer.json" in documents and not _is_tokenizer(documents["tokenizer.json"]):
        problems.append("tokenizer.json is not a valid tokenizer: expected an object with `model` and its `vocab`")
    for name, document in documents.items():
        if not isinstance(document, dict) or not document.get("auto_map"):
            continue
        if is_supported(model.architecture):
            progress(f"{name}: `auto_map` is ignored: transformers supports `{model.architecture}` itself")
        else:
            problems.append(
                f"{name} has `auto_map`, and transformers does not support `{model.architecture[:60]}` itself: code "
                "that "
                "comes with a model is never run; choose another model"
            )
    if problems:
        raise SourceError(f"the source can't be used: {'; '.join(problems)}")


def _is_tokenizer(document: object) -> bool:
    """Whether a tokenizer.json has the form that the library `tokenizers` can read."""
    model = document.get("model") if isinstance(document, dict) else None
    return isinstance(model, dict) and isinstance(model.get("vocab"), dict | list)


MODEL: Contents = Contents(_weights, _is_taken, _require, _check_content)
"""A model: weights, configuration and tokenizer."""
