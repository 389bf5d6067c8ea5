"""The model hub through `huggingface_hub`: what a revision holds, and one file of it, resumed where it broke off."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self, cast

import httpx2
from huggingface_hub import HfApi, hf_hub_url, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from huggingface_hub.utils._http import hf_request_event_hook

from pipeline.errors import SourceError, UnreachableError
from registry import network
from registry.counting import Counter

Progress = Callable[[str], None]

_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
# Seconds to wait for the hub's first answer.
_TIMEOUT = 10


def _client() -> httpx2.Client:
    """Return what `huggingface_hub` asks through, under the policy of `registry.network`."""
    return httpx2.Client(
        verify=network.tls(), follow_redirects=True, timeout=_TIMEOUT,
        event_hooks={"request": [hf_request_event_hook], "response": [_check_redirect]},
    )  # fmt: skip


def _check_redirect(answer: httpx2.Response) -> None:
    if answer.has_redirect_location:
        try:
            there = answer.url.join(answer.headers["Location"])
        except httpx2.InvalidURL as error:
            raise SourceError(f"the hub at {answer.url.host} is not followed: the address is malformed") from error
        problem = network.redirect_problem(answer.request.method, str(answer.url), str(there))
        if problem is not None:
            raise SourceError(f"the hub at {answer.url.host} is not followed: {problem}")


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
    """A hub: where it is, and the token that it wants, if any; the token is never shown."""

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
            api = HfApi(endpoint=self.endpoint, token=self.token or False)
            found = api.model_info(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT)
            if not isinstance(found.sha, str) or _COMMIT.fullmatch(found.sha) is None:
                raise SourceError(
                    f"the hub at {self.endpoint} answers {str(found.sha)[:60]!r} for {repository}@{revision}: expected "
                    "a commit of 40 hex digits"
                )
            return found.sha, [self._file(sibling) for sibling in found.siblings or []]

    def download(self, repository: str, commit: str, name: str, *, size: int, part: Path, progress: Progress) -> None:
        """Bring ``part`` to ``size`` bytes of the file ``name``, going on from what it holds already.

        Raises:
            SourceError: the hub does not answer, or not with this file; what came so far stays for the next try.
        """
        headers = build_hf_headers(token=self.token or False)
        # Offsets count in the file's own bytes, so that nothing may be compressed on the way.
        headers["Accept-Encoding"] = "identity"
        if part.exists() and part.stat().st_size > size:
            part.unlink()
        with self._explained(repository, commit), part.open("ab") as stream:
            http_get(
                hf_hub_url(repository, name, revision=commit, endpoint=self.endpoint),
                cast("BinaryIO", stream),
                resume_size=stream.tell(),
                headers=headers,
                expected_size=size,
                displayed_filename=name,
                tqdm_class=cast("Any", _lines(name, size, progress)),
            )

    def read(self, repository: str, commit: str, name: str, *, start: int, length: int) -> bytes:
        """Return ``length`` bytes of the file ``name`` from ``start`` on (fewer where it ends), and fetch no more.

        Raises:
            SourceError: the hub does not answer, or not with these bytes.
        """
        headers = build_hf_headers(token=self.token or False)
        headers |= {"Accept-Encoding": "identity", "Range": f"bytes={start}-{start + length - 1}"}
        url = hf_hub_url(repository, name, revision=commit, endpoint=self.endpoint)
        got = bytearray()
        with (
            self._explained(repository, commit),
            get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as answer,
        ):
            hf_raise_for_status(answer)
            if start and answer.status_code != httpx2.codes.PARTIAL_CONTENT:
                raise SourceError(f"{self.endpoint} can't send a part of {name}: pull the model, then plan")
            # A server that knows no ranges sends all of it: what is not wanted is not waited for.
            for chunk in answer.iter_bytes():
                got += chunk
                if len(got) >= length:
                    break
        return bytes(got[:length])

    def _file(self, sibling: RepoSibling) -> HubFile:
        """Take what the hub says of a file, once size and digests have their form; whoever joins its name checks it."""
        name, size = sibling.rfilename, sibling.size
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        blob = None if sibling.lfs else sibling.blob_id
        if not isinstance(size, int) or size < 0:
            raise SourceError(f"the hub at {self.endpoint} names no size for {name}: it may be too old, or no hub")
        for digest, form in ((sha256, _SHA256), (blob, _COMMIT)):
            if digest is not None and (not isinstance(digest, str) or form.fullmatch(digest) is None):
                raise SourceError(f"the hub at {self.endpoint} names {str(digest)[:80]!r} as the digest of {name}")
        return HubFile(name, size, sha256, blob)

    def _shown(self, error: Exception) -> str:
        """What a library says, without the token: libraries show headers that they do not like."""
        said = str(error)
        for form in (self.token or "", repr(self.token or "")[1:-1]):
            said = said.replace(form, "HF_TOKEN") if form else said
        return said

    @contextlib.contextmanager
    def _explained(self, repository: str, revision: str) -> Iterator[None]:
        """Turn every failure of the hub into one line that says what to do."""
        what = f"hf://{repository}@{revision}"
        token = "the HF_TOKEN that is set" if self.token else "no token (HF_TOKEN is not set)"
        try:
            yield
        except GatedRepoError as error:
            raise SourceError(
                f"{what} is gated, and {token} opens it: accept its terms at {self.endpoint}/{repository}, "
                "then set HF_TOKEN to a token of that account"
            ) from error
        except RevisionNotFoundError as error:
            raise SourceError(f"{repository} has no revision `{revision}` at {self.endpoint}") from error
        except RemoteEntryNotFoundError as error:
            raise SourceError(f"{what} lacks a file that it listed: try again, or name another revision") from error
        except RepositoryNotFoundError as error:
            raise SourceError(
                f"{what} is not at {self.endpoint}, or is private: check the name; asked with {token}"
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            kind = UnreachableError if status == httpx2.codes.TOO_MANY_REQUESTS or status >= 500 else SourceError
            raise kind(f"{self.endpoint} refused {what} with status {status}") from error
        except HFValidationError as error:
            raise SourceError(
                f"hf://{repository} is no name of a model: expected hf://ORG/NAME ({self._shown(error)})"
            ) from error
        except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
            raise UnreachableError(
                f"can't reach the hub at {self.endpoint}: {self._shown(error) or type(error).__name__}; check the"
                " network or HF_ENDPOINT and run again: what was downloaded is kept"
            ) from error
        except OSError as error:
            raise SourceError(
                f"{what} could not be stored or did not come whole: {self._shown(error)}; run again"
            ) from error


class _Bar(Protocol):
    def update(self, amount: float | None = 1) -> None: ...


def _lines(name: str, size: int, progress: Progress) -> Callable[..., _Bar]:
    """Give what `huggingface_hub` takes for a progress bar, and reports a count now and then."""

    class Bar:
        def __init__(self, *, initial: int = 0, **_: object) -> None:
            self.counter = Counter(progress, name, size / 1e6, "MB", before=initial / 1e6)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def close(self) -> None:
            pass

        def update(self, amount: float | None = 1) -> None:
            self.counter.add((amount or 0) / 1e6)

    return Bar
