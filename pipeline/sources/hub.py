"""A hub of models and data sets as an origin: lists the files of a revision, and opens a file at any byte.

`huggingface_hub` provides addresses, headers and errors. Answers are read here, because a hub is not trusted: each is
limited in bytes as sent (compressed ones are refused) and in seconds, and JSON also in values and depth. An unexpected
answer is a ``SourceError``. Waiting times are fixed here, whatever the hub asks for.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast
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
from pipeline.sources.origin import Access, Chunks, Found, SourceFile
from registry import network
from registry.bounded_json import Bounds, DocumentError, read_json
from registry.download import InterruptedStreamError, Reader
from registry.errors import NetworkSettingError
from registry.stream import BUSY

_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
# Hosts that are reached without a proxy.
_HERE = ("all://localhost", "all://127.0.0.1", "all://[::1]")
# Seconds without a byte.
_TIMEOUT = 10
# A file of a revision takes some 300 bytes and a dozen values; the largest revisions have some ten thousand files.
_REVISION = Bounds(bytes=32 << 20, values=1_000_000)
_DOCUMENT_SECONDS = network.ANSWER_SECONDS
# The hub's findings about a model card, of which the first few are shown.
_FINDINGS = Bounds(bytes=1 << 20, values=10_000)
_MOST_FINDINGS, _FINDING_LENGTH = 5, 300
# Marks a request of which the answer's body is read whatever its status.
_READ_REFUSAL = {"slipway.read_refusal": True}
_REPOSITORY = re.compile(r"hf://(?P<datasets>datasets/)?(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>.+))?")


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
    if not answer.is_success and not answer.request.extensions.keys() & _READ_REFUSAL.keys():
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
class Hub:
    """A hub: its address, and the token for it, if any, which is never shown."""

    endpoint: str
    token: str | None
    datasets: bool = False
    """Whether repositories are data sets."""

    def __repr__(self) -> str:
        return f"Hub({self.endpoint!r})"

    def revision(self, repository: str, revision: str) -> tuple[str, tuple[SourceFile, ...]]:
        """Resolve a branch, a tag or a commit: return the commit's 40 hex digits and its files.

        Raises:
            SourceError: no such model or revision, no access, or no answer.
        """
        with self._explained(repository, revision):
            validate_repo_id(repository)
            kind = "datasets" if self.datasets else "models"
            url = f"{self.endpoint}/api/{kind}/{repository}/revision/{quote(revision, safe='')}?blobs=true"
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
        return commit, tuple(self._file(sibling) for sibling in siblings)

    @contextlib.contextmanager
    def open(
        self, repository: str, commit: str, name: str, start: int, stop: int | None = None
    ) -> Iterator[tuple[Reader, int]]:
        """Open a file at byte ``start``, or at its first one if the hub does not support range requests.

        Raises:
            InterruptedStreamError: the connection broke, or the hub is busy.
            SourceError: the hub refuses, or has no such file.
        """
        kind = "dataset" if self.datasets else None
        url = hf_hub_url(repository, name, revision=commit, endpoint=self.endpoint, repo_type=kind)
        wanted = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop is not None else {}
        with self._explained(repository, commit), self._resumable(), self._asked(url, wanted) as answer:
            begun = start if answer.status_code == httpx2.codes.PARTIAL_CONTENT else 0
            yield Chunks(self._pieces(answer)), begun

    def check_card(self, repository: str, branch: str, card: str) -> tuple[list[str], list[str]]:
        """Let the hub check the metadata of a model card; return its errors, and its warnings.

        Raises:
            SourceError: the hub refuses, or does not answer.
        """
        with (
            self._explained(repository, branch),
            get_session().stream(
                "POST",
                f"{self.endpoint}/api/validate-yaml",
                json={"content": card, "repoType": "model"},
                headers=build_hf_headers(token=self.token or False),
                timeout=_TIMEOUT,
                extensions=_READ_REFUSAL,
            ) as answer,
        ):
            is_refused = answer.status_code == httpx2.codes.BAD_REQUEST
            if not is_refused:
                hf_raise_for_status(answer)
            body = b"".join(network.within(answer.iter_raw(), _FINDINGS.bytes, _DOCUMENT_SECONDS))
            found = self._document(body, _FINDINGS)
        errors, warnings = (self._messages(found.get(kind)) for kind in ("errors", "warnings"))
        return errors or ["it gives no reason"] * is_refused, warnings

    def _messages(self, findings: object) -> list[str]:
        if not isinstance(findings, list):
            raise self._strange("it does not list its findings about the model card")
        messages = (str(each.get("message") if isinstance(each, dict) else each) for each in findings[:_MOST_FINDINGS])
        return [" ".join(message.split())[:_FINDING_LENGTH] for message in messages]

    def _pieces(self, answer: httpx2.Response) -> Iterator[bytes]:
        """The body as it arrives: chunks of a fixed size would hide a slow connection."""
        with self._resumable():
            yield from answer.iter_raw()

    @contextlib.contextmanager
    def _resumable(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.NetworkError, httpx2.TimeoutException, httpx2.RemoteProtocolError) as error:
            raise InterruptedStreamError(
                f"can't reach the hub at {self.endpoint}: {self._shown(error) or type(error).__name__}"
            ) from error
        except HfHubHTTPError as error:
            if not _may_pass(error.response.status_code):
                raise
            raise InterruptedStreamError(f"the hub at {self.endpoint} answers {error.response.status_code}") from error

    @contextlib.contextmanager
    def _asked(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """Send a GET request, and yield its answer if it is a success; the body is not read yet."""
        known = build_hf_headers(token=self.token or False)
        with get_session().stream("GET", url, headers={**known, **headers}, timeout=_TIMEOUT) as answer:
            hf_raise_for_status(answer)
            yield answer

    def _document(self, data: bytes, bounds: Bounds = _REVISION) -> Mapping[str, Any]:
        try:
            found = read_json(data, bounds)
        except DocumentError as error:
            raise self._strange(str(error)) from error
        if not isinstance(found, dict):
            raise self._strange("its answer is not a JSON object")
        return found

    def _file(self, sibling: object) -> SourceFile:
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
        return SourceFile(name, size, sha256, blob)

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
        what = f"hf://{'datasets/' * self.datasets}{repository}@{revision}"
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
            kind = UnreachableError if _may_pass(status) else SourceError
            expired = ": HF_TOKEN is not valid, or has expired" if status == httpx2.codes.UNAUTHORIZED else ""
            raise kind(f"{self.endpoint} refused {what} with status {status}{expired}") from error
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


def _may_pass(status: int) -> bool:
    """Whether another try can have another answer; a CDN has statuses of its own above 511."""
    return status in BUSY or status >= httpx2.codes.INTERNAL_SERVER_ERROR


@dataclass(frozen=True)
class HubModel:
    """A model or a data set on a hub as an `Origin`; its revisions are commits."""

    hub: Hub
    repository: str
    wanted: str

    @property
    def uri(self) -> str:
        """The model without its revision."""
        return f"hf://{'datasets/' * self.hub.datasets}{self.repository}"

    @property
    def pinned(self) -> str | None:
        """The commit, if the model's file names one."""
        return self.wanted if _COMMIT.fullmatch(self.wanted) else None

    def find(self) -> Found:
        """Resolve the branch, tag or commit, and list its files."""
        return Found(*self.hub.revision(self.repository, self.wanted))

    def open(
        self, revision: str | None, file: SourceFile, start: int, stop: int | None = None
    ) -> AbstractContextManager[tuple[Reader, int]]:
        """Open a file of a commit."""
        return self.hub.open(self.repository, str(revision), file.path, start, stop)


def open_model(uri: str, revision: str | None, access: Access) -> HubModel:
    """Open ``hf://ORG/NAME[@REVISION]`` or ``hf://datasets/ORG/NAME[@REVISION]``; the default revision is ``main``."""
    match = _REPOSITORY.fullmatch(uri)
    if match is None:
        raise SourceError(f"can't pull from `{uri}`: expected hf://ORG/NAME[@REVISION]")
    named = match["revision"]
    if named and revision and named != revision:
        raise SourceError(f"`uri` names @{named}, but `revision` is {revision}: remove one of them")
    hub = Hub(access.hub_endpoint, access.hub_token, datasets=match["datasets"] is not None)
    return HubModel(hub, match["repository"], named or revision or "main")
