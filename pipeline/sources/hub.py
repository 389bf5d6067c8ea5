"""A model hub: lists the files of a revision, and downloads one file, resuming where a download broke off.

`huggingface_hub` provides addresses, headers and errors. Answers are read here, because a hub is not trusted: each is
limited in bytes as sent (compressed ones are refused) and in seconds, and JSON also in values and depth. An unexpected
answer is a ``SourceError``. Waiting times are fixed here, whatever the hub asks for.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote

import httpx2
from huggingface_hub import hf_hub_url, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id
from huggingface_hub.utils._http import hf_request_event_hook

from pipeline.errors import SourceError, UnreachableError
from registry import network
from registry.bounded_json import Bounds, DocumentError, read_json
from registry.counting import Counter
from registry.errors import NetworkSettingError
from registry.progress import Progress

_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
# Hosts that are reached without a proxy.
_HERE = ("all://localhost", "all://127.0.0.1", "all://[::1]")
# Seconds without a byte.
_TIMEOUT = 10
# A file of a revision takes some 300 bytes and a dozen values; the largest revisions have some ten thousand files.
_REVISION = Bounds(bytes=32 << 20, values=1_000_000)
_DOCUMENT_SECONDS = network.ANSWER_SECONDS
# How many breaks of a download in a row, without progress, are tolerated; and the pause after each, in seconds.
_MOST_BREAKS, _PAUSE = 5, 1.0


def _client() -> httpx2.Client:
    """Return the HTTP client of `huggingface_hub`, under the policy of `registry.network`."""
    try:
        return httpx2.Client(
            verify=network.tls(), follow_redirects=True, timeout=_TIMEOUT, mounts=dict.fromkeys(_HERE),
            event_hooks={"request": [_ask_plainly, hf_request_event_hook], "response": [_check]},
        )  # fmt: skip
    except (ImportError, ValueError, httpx2.InvalidURL) as error:  # a SOCKS proxy, or one with an unknown scheme
        raise SourceError(
            "the hub can't be reached through the configured proxy: set HTTPS_PROXY to http://HOST:PORT, not ALL_PROXY"
        ) from error


def _ask_plainly(request: httpx2.Request) -> None:
    request.headers["Accept-Encoding"] = "identity"


def _check(answer: httpx2.Response) -> None:
    """Check an answer against the policy before its body is read; drop the body of an answer that is not a success."""
    there = str(_redirect_target(answer)) if answer.has_redirect_location else None
    encoding = answer.headers.get("Content-Encoding", "")
    problem = network.answer_problem(answer.request.method, str(answer.url), there, encoding)
    if problem is not None:
        raise SourceError(f"the hub at {answer.url.host} {problem}")
    if not answer.is_success:
        answer.stream = _NoBody(cast("httpx2.SyncByteStream", answer.stream))
    # `huggingface_hub` would print it.
    answer.headers.pop("X-HF-Warning", None)


def _redirect_target(answer: httpx2.Response) -> httpx2.URL:
    try:
        there = answer.url.join(answer.headers["Location"])
        _ = there.host  # decoding fails for an invalid host name
    except (httpx2.InvalidURL, ValueError) as error:
        raise SourceError(f"the hub at {answer.url.host} redirects to a malformed address") from error
    return there


class _NoBody(httpx2.SyncByteStream):
    """Replaces the body of an error or redirect, which is not needed and may have any size."""

    def __init__(self, body: httpx2.SyncByteStream) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        return iter(())

    def close(self) -> None:
        self._body.close()


set_client_factory(_client)


@dataclass(frozen=True)
class HubFile:
    """One file of a revision. The hub knows the ``sha256`` of large files, and of others git's ``blob`` digest."""

    path: str
    size: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True)
class Hub:
    """A hub: its address, and the token for it, if any, which is never shown."""

    endpoint: str
    token: str | None

    def __repr__(self) -> str:
        return f"Hub({self.endpoint!r})"

    def revision(self, repository: str, revision: str) -> tuple[str, list[HubFile]]:
        """Resolve a branch, a tag or a commit: return the commit's 40 hex digits and its files.

        Raises:
            SourceError: no such model or revision, no access, or no answer.
        """
        with self._explained(repository, revision):
            validate_repo_id(repository)
            url = f"{self.endpoint}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
            with self._asked(url, {}) as answer:
                found = self._document(b"".join(network.within(answer.iter_raw(), _REVISION.bytes, _DOCUMENT_SECONDS)))
        commit = found.get("sha")
        if not isinstance(commit, str) or _COMMIT.fullmatch(commit) is None:
            raise SourceError(
                f"the hub at {self.endpoint} answers {str(commit)[:60]!r} for {repository}@{revision}: expected "
                "a commit of 40 hex digits"
            )
        siblings = found.get("siblings") or []
        if not isinstance(siblings, list):
            raise self._strange(f"`siblings` of {repository}@{revision} is not a list of files")
        return commit, [self._file(sibling) for sibling in siblings]

    def download(self, repository: str, commit: str, name: str, *, size: int, part: Path, progress: Progress) -> None:
        """Download the file ``name`` of ``size`` bytes to ``part``, continuing after the bytes that it holds already.

        Raises:
            SourceError: the hub does not answer, or not with this file; ``part`` is kept for the next try.
        """
        with self._explained(repository, commit), part.open("ab") as stream:
            if stream.tell() > size:
                _empty(stream)
            counter = Counter(progress, name, size / 1e6, "MB", before=stream.tell() / 1e6)
            pace, breaks = network.Pace(), 0
            while (held := stream.tell()) < size:
                try:
                    self._fill(repository, commit, name, size, stream, pace, counter)
                except (httpx2.NetworkError, httpx2.TimeoutException, httpx2.RemoteProtocolError) as error:
                    breaks = 1 if stream.tell() > held else breaks + 1
                    if breaks > _MOST_BREAKS:
                        raise
                    progress(f"{name}: {self._shown(error) or type(error).__name__}; trying again")
                    time.sleep(_PAUSE)

    def read(self, repository: str, commit: str, name: str, *, start: int, length: int) -> bytes:
        """Return ``length`` bytes of the file ``name`` from ``start`` on, or fewer at its end; fetch no more than that.

        Raises:
            SourceError: the hub does not answer, or not with these bytes.
        """
        url = hf_hub_url(repository, name, revision=commit, endpoint=self.endpoint)
        got, deadline = bytearray(), time.monotonic() + _DOCUMENT_SECONDS
        with (
            self._explained(repository, commit),
            self._asked(url, {"Range": f"bytes={start}-{start + length - 1}"}) as answer,
        ):
            if start and answer.status_code != httpx2.codes.PARTIAL_CONTENT:
                raise SourceError(
                    f"{self.endpoint} does not support range requests, so {name} can't be read in parts: download the "
                    "model and plan its folder"
                )
            # A server without range requests sends the whole file; stop after the wanted bytes.
            for chunk in answer.iter_raw():
                got += chunk
                if len(got) >= length:
                    break
                if time.monotonic() > deadline:
                    raise NetworkSettingError(f"took more than {_DOCUMENT_SECONDS:g} s for {length} bytes of {name}")
        return bytes(got[:length])

    @contextlib.contextmanager
    def _asked(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """Send a GET request, and yield its answer if it is a success; the body is not read yet."""
        known = build_hf_headers(token=self.token or False)
        with get_session().stream("GET", url, headers={**known, **headers}, timeout=_TIMEOUT) as answer:
            hf_raise_for_status(answer)
            yield answer

    def _fill(
        self, repository: str, commit: str, name: str, size: int, stream: BinaryIO, pace: network.Pace, counter: Counter
    ) -> None:  # fmt: skip
        """Append the missing bytes of a file, over one connection, as far as it lasts."""
        held = stream.tell()
        url = hf_hub_url(repository, name, revision=commit, endpoint=self.endpoint)
        with self._asked(url, {"Range": f"bytes={held}-"} if held else {}) as answer:
            if held and answer.status_code != httpx2.codes.PARTIAL_CONTENT:  # it does not support range requests
                _empty(stream)
                counter.add(-held / 1e6)
            for chunk in answer.iter_raw():  # as it arrives: chunks of a fixed size would hide a slow connection
                stream.write(chunk)
                pace.add(len(chunk))
                counter.add(len(chunk) / 1e6)
                if stream.tell() > size:
                    _empty(stream)
                    raise SourceError(f"the hub at {self.endpoint} sends more than the {size} bytes of {name}")
        if stream.tell() < size:
            raise httpx2.RemoteProtocolError(f"the connection ended after {stream.tell()} of {size} bytes")

    def _document(self, data: bytes) -> Mapping[str, Any]:
        try:
            found = read_json(data, _REVISION)
        except DocumentError as error:
            raise self._strange(str(error)) from error
        if not isinstance(found, dict):
            raise self._strange("its answer is not a JSON object")
        return found

    def _file(self, sibling: object) -> HubFile:
        """Parse the entry of a file, and check its size and digests. The caller must check the name before using it."""
        if not isinstance(sibling, dict) or not isinstance(name := sibling.get("rfilename"), str):
            raise self._strange("it lists a file without a name")
        size, large = sibling.get("size"), sibling.get("lfs")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise SourceError(
                f"the hub at {self.endpoint} states no size of {name}: it may be too old, or not a model hub"
            )
        if large is not None and not isinstance(large, dict):
            raise self._strange(f"`lfs` of {name} is not an object")
        sha256 = large.get("sha256") if large else None
        blob = None if large else sibling.get("blobId")
        for digest, form in ((sha256, _SHA256), (blob, _COMMIT)):
            if digest is not None and (not isinstance(digest, str) or form.fullmatch(digest) is None):
                raise SourceError(
                    f"the hub at {self.endpoint} states an invalid digest of {name}: {str(digest)[:80]!r}"
                )
        return HubFile(name, size, sha256, blob)

    def _strange(self, what: str) -> SourceError:
        return SourceError(f"{self.endpoint} does not answer like a model hub: {what[:200]}")

    def _shown(self, error: Exception) -> str:
        """An error's text without the token: libraries print headers that they reject."""
        said = str(error)
        for form in (self.token or "", repr(self.token or "")[1:-1]):
            said = said.replace(form, "HF_TOKEN") if form else said
        return said

    @contextlib.contextmanager
    def _explained(self, repository: str, revision: str) -> Iterator[None]:
        """Turn every failure of the hub into an error that says what to do."""
        what = f"hf://{repository}@{revision}"
        token = "with HF_TOKEN" if self.token else "without a token (HF_TOKEN is not set)"
        try:
            yield
        except GatedRepoError as error:
            raise SourceError(
                f"{what} is gated, and was requested {token}: accept its terms at {self.endpoint}/{repository}, "
                "then set HF_TOKEN to a token of that account"
            ) from error
        except RevisionNotFoundError as error:
            raise SourceError(f"{repository} has no revision `{revision}` at {self.endpoint}") from error
        except RemoteEntryNotFoundError as error:
            raise SourceError(
                f"{what} lists a file that it does not have: try again, or choose another revision"
            ) from error
        except RepositoryNotFoundError as error:
            raise SourceError(
                f"{what} does not exist at {self.endpoint}, or is private: check the name (requested {token})"
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            kind = UnreachableError if status == httpx2.codes.TOO_MANY_REQUESTS or status >= 500 else SourceError
            raise kind(f"{self.endpoint} refused {what} with status {status}") from error
        except HFValidationError as error:
            raise SourceError(
                f"hf://{repository} is not a valid model name: expected hf://ORG/NAME ({self._shown(error)})"
            ) from error
        except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
            raise UnreachableError(
                f"can't reach the hub at {self.endpoint}: {self._shown(error) or type(error).__name__}; check the"
                " network or HF_ENDPOINT and run again: downloaded parts are kept"
            ) from error
        except NetworkSettingError as error:
            raise UnreachableError(f"the hub at {self.endpoint} {error}") from error
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise SourceError(f"the hub at {self.endpoint} redirects to an invalid address") from error
        except OSError as error:
            raise SourceError(f"{what} could not be downloaded or stored: {self._shown(error)}; run again") from error


def _empty(stream: BinaryIO) -> None:
    stream.seek(0)
    stream.truncate()
