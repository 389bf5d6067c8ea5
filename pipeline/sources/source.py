"""Where weights come from: resolve a revision, pull its files, check every one, and hold it to its lock.

A source is a folder, ``file:FOLDER``, or a model on a hub, ``hf://ORG/NAME[@REVISION]``. Only safetensors, JSON and
tokenizer files at its top are taken. A pickle can run code when it is loaded and is refused; a hub's model that has
safetensors beside its pickles is taken without them. Code that comes with a model is never run.
A lock (`pipeline.sources.lock`) pins what the first good pull found.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
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


# The file of a home in which `resolve` remembers.
DIGESTS = "digests.json"

_CHUNK = 4 * 1024 * 1024
# A tokenizer of 262,144 words takes 35 MB and two million values.
_DOCUMENT = Bounds(bytes=128 << 20, values=8_000_000, depth=64)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What the Hugging Face cache calls a blob: git's digest, or the sha256 of a large file.
_BLOB = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_HUB = re.compile(r"hf://(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>.+))?")
# A name of a file at the top: no way to another folder, no control character, no longer than file systems take.
_PLAIN = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,200}")
_TOKENIZER = re.compile(r"(tokenizer|spiece|sentencepiece|.+\.bpe)\.model|(merges|vocab)\.txt|.+\.(jinja|tiktoken)")
# What a tokenizer may be, all files of a form; for others transformers would need sentencepiece or tiktoken.
_TOKENIZER_FORMS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
_PICKLE = re.compile(r".+\.(bin|pt|pth|ckpt|pkl|pickle|joblib)")
# Linux: let two files share their blocks until one is written to (btrfs, XFS).
_FICLONE = 0x40049409


@dataclass(frozen=True)
class SourceFile:
    """One file to pull, with the digests that a lock or the hub states (see `hub.HubFile`)."""

    path: str
    size: int
    sha256: str | None = None
    blob: str | None = None


@dataclass(frozen=True)
class ResolvedSource:
    """What will be pulled, exactly. ``revision`` is a commit, or None for a folder, whose files decide.

    Of what is not pulled, ``left_out`` has the names. A folder's digests are remembered in the file ``memory``.
    """

    uri: str
    revision: str | None
    files: tuple[SourceFile, ...]
    left_out: tuple[str, ...]
    hub: Hub | None = None
    lock: Lock | None = None
    memory: Path | None = None

    @cached_property
    def fingerprint(self) -> str:
        """What changes with the content and with nothing else: the commit, or the digest over a folder's files."""
        return self.revision or digest_json(self.sha256)

    @cached_property
    def sha256(self) -> dict[str, str]:
        """A folder's files as they were when this was first asked, path → 64 hex digits."""
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
) -> ResolvedSource:
    """Find out what ``uri`` at ``revision`` (a commit, tag or branch; default ``main``) holds, without its weights.

    Under a ``lock`` a hub is not asked: the lock has it all. ``memory`` is where the digests of a folder's files are
    remembered (`pipeline.sources.file_digests`).

    Raises:
        SourceError: there is no such source, it can't be reached, it holds what is refused, or the lock is of another.
    """
    if uri.startswith("file:"):
        if revision is not None:
            raise SourceError(f"`source.revision` means nothing to {uri}: its lock pins a folder's files; remove it")
        return _resolve_folder(uri, lock, memory)
    match = _HUB.fullmatch(uri)
    if match is None:
        raise SourceError(f"can't pull from `{uri}`: expected file:FOLDER or hf://ORG/NAME[@REVISION]")
    named = match["revision"]
    if named and revision and named != revision:
        raise SourceError(f"`source.uri` says @{named} and `source.revision` says {revision}: keep one")
    from pipeline.sources.hub import Hub  # noqa: PLC0415 - the hub's client takes a third of a second to import

    return _resolve_hub(match["repository"], named or revision or "main", Hub(endpoint, token), lock)


def pull(resolved: ResolvedSource, folder: Path, downloads: Path, progress: Progress) -> dict[str, str]:
    """Put the source's files into the empty ``folder``, each checked, and return their sha256 by path.

    What a hub sends is kept in ``downloads`` until all of it is there, so that a broken pull goes on where it stopped.

    Raises:
        SourceError: a file is not what the lock or the hub says, or is damaged, or wants code run; lists them all.
    """
    for name in resolved.left_out:
        progress(f"left out: {name}")
    place = _copy_folder if resolved.hub is None else _download
    digests = place(resolved, folder, downloads, progress)
    _check_content(folder, progress)
    progress(f"pulled {len(digests)} files, {resolved.bytes / 1e6:.1f} MB")
    return digests


def hold_to_lock(path: Path, resolved: ResolvedSource, sha256: Mapping[str, str]) -> None:
    """Compare what was pulled (path → sha256) with the lock in ``path``, or write it where there is none.

    Raises:
        SourceError: listing all that is different, missing or extra.
    """
    lock = read_lock(path)
    if lock is None:
        sizes = {file.path: file.size for file in resolved.files}
        files = {name: LockedFile(size=sizes[name], sha256=digest) for name, digest in sorted(sha256.items())}
        write_lock(Lock(path=path, uri=portable(resolved.uri, path), revision=resolved.revision, files=files))
    else:
        lock.refuse_difference(sha256)


def revision_of(resolved: ResolvedSource, sha256: Mapping[str, str]) -> str:
    """The revision that a release records: a hub's commit, or for a folder the digest over its files' digests."""
    return resolved.revision or digest_json(dict(sha256))


def _visible(uri: str, folder: Path) -> list[str]:
    """Return what is in a folder and not hidden, by its path in it, sorted."""

    def refuse(name: str, why: str) -> None:
        if not _hidden(Path(name)):
            raise SourceError(f"{uri} can't be taken: `{name}`: {why}")

    found = [name for name, _ in entries(folder, refuse) if not _hidden(Path(name))]
    return sorted(found, key=lambda name: Path(name).parts)


def _resolve_folder(uri: str, lock: Lock | None, memory: Path | None) -> ResolvedSource:
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
    weights = _weights(uri, names, lambda: _read_start(folder, INDEX))
    taken = [name for name in names if _is_taken(name, weights)]
    if lock is not None:
        lock.refuse_other(uri, None)
        lock.refuse_difference(dict.fromkeys(taken))
    _require(uri, taken)
    return ResolvedSource(
        uri=uri,
        revision=None,
        files=tuple(SourceFile(name, _size(folder, name)) for name in taken),
        left_out=tuple(name for name in names if name not in taken),
        lock=lock,
        memory=memory,
    )


def _resolve_hub(repository: str, revision: str, hub: Hub, lock: Lock | None) -> ResolvedSource:
    uri = f"hf://{repository}"
    if lock is not None:
        lock.refuse_other(uri, revision if _COMMIT.fullmatch(revision) else None)
        if lock.revision is None:
            raise SourceError(f"{lock.path} names no commit: delete it to lock {uri} anew")
        files = tuple(SourceFile(name, file.size, file.sha256) for name, file in sorted(lock.files.items()))
        if outside := [file.path for file in files if not _is_taken(file.path, _locked_weights(lock))]:
            raise SourceError(f"{lock.path} names {_listed(outside)}, which is never pulled: delete it to lock anew")
        return ResolvedSource(uri, lock.revision, files, (), hub, lock)
    commit, found = hub.revision(repository, revision)
    names = [file.path for file in found]
    weights = _weights(uri, names, lambda: hub.read(repository, commit, INDEX, start=0, length=INDEX_BOUNDS.bytes + 1))
    taken = [file for file in found if _is_taken(file.path, weights)]
    _require(uri, [file.path for file in taken])
    return ResolvedSource(
        uri=uri,
        revision=commit,
        files=tuple(SourceFile(file.path, file.size, file.sha256, file.blob) for file in taken),
        left_out=tuple(sorted(name for name in names if not _is_taken(name, weights) and not _hidden(Path(name)))),
        hub=hub,
    )


def _place(folder: Path, name: str) -> tuple[Path, str]:
    """Where a file of a source truly is: a folder without links, and a path in it.

    It is the file itself, or what a link leads to within the folder or, as the Hugging Face cache has it, from
    ``snapshots/REVISION`` to ``blobs/DIGEST`` beside it.

    Raises:
        SourceError: a link leads elsewhere, or nowhere.
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
        f"{folder / name} is a link to {target}: a source's links may lead only within its folder, or to the blobs of "
        "a Hugging Face cache; copy the file in its place"
    )


def _opened(folder: Path, name: str) -> BinaryIO:
    """Open a file of a source; ``SourceError`` where it is no regular file, or leads outside."""
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
    """The files with the weights; where there are pickles alone they are named."""
    if not any(name.endswith(".safetensors") for name in names):
        if pickles := [name for name in names if _PICKLE.fullmatch(name)]:
            raise SourceError(
                f"{uri} has no safetensors, only {_listed(pickles)}: a pickle can run code when it is loaded; "
                "choose a revision with safetensors, or convert it"
            )
        raise SourceError(f"{uri} has no {SINGLE}: it holds {_listed(names) if names else 'nothing'}")
    try:
        return weight_files(names, read_index(index()) if INDEX in names else None)
    except HeaderError as error:
        raise SourceError(f"{uri}: {error}") from error


def _require(uri: str, taken: list[str]) -> None:
    """A model has a configuration, and a tokenizer in a form that every worker reads."""
    if "config.json" not in taken:
        raise SourceError(f"{uri} has no config.json: it holds {_listed(taken)}")
    if any(all(name in taken for name in form) for form in _TOKENIZER_FORMS):
        return
    found = [name for name in taken if _TOKENIZER.fullmatch(name)]
    raise SourceError(
        f"{uri} has no tokenizer.json"
        + (f", only {_listed(found)}, which no worker reads" if found else "")
        + ": complete the folder, or save the tokenizer with transformers (`AutoTokenizer.from_pretrained(…)"
        ".save_pretrained(…)`), which writes it"
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
    """Copy a file, or let it share the source's blocks, and return its sha256; its bytes are read once."""
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
        raise SourceError(f"{resolved.uri} is no hub's model")
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
        raise SourceError(f"{resolved.uri}@{commit} did not come as the hub promised, run again: {'; '.join(problems)}")
    for file in resolved.files:
        shutil.move(kept / (file.path + ".part"), folder / file.path)
        set_mode(folder / file.path, 0o644)
    shutil.rmtree(kept)
    return digests


def _verify(path: Path, file: SourceFile) -> tuple[str, str | None]:
    """Return a file's sha256, and what is wrong with it. Git's digest of a blob covers a head with its size."""
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
    """Parse every header and configuration: weights complete, a head, a tokenizer, nothing that wants code run."""
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
        problems.append("config.json is no JSON object")
        config = {}
    model = ModelDescription(config, {})
    try:
        model = ModelDescription(config, read_model(folder))
    except HeaderError as error:
        problems += str(error).splitlines()
    if model.lacks_head:
        problems.append("the weights have no output head, and config.json ties none to the embedding: the model is cut")
    if "tokenizer.json" in documents and not _is_tokenizer(documents["tokenizer.json"]):
        problems.append("tokenizer.json describes no tokenizer: expected an object with `model` and its `vocab`")
    for name, document in documents.items():
        if not isinstance(document, dict) or not document.get("auto_map"):
            continue
        if is_supported(model.architecture):
            progress(f"{name}: `auto_map` is left out: transformers has `{model.architecture}` itself")
        else:
            problems.append(
                f"{name} has `auto_map`, and transformers does not have `{model.architecture[:60]}` itself: code that "
                "comes with a model is never run; choose another model"
            )
    if problems:
        raise SourceError(f"the source can't be used: {'; '.join(problems)}")


def _is_tokenizer(document: object) -> bool:
    """Whether a tokenizer.json has the form that the library `tokenizers` reads."""
    model = document.get("model") if isinstance(document, dict) else None
    return isinstance(model, dict) and isinstance(model.get("vocab"), dict | list)
