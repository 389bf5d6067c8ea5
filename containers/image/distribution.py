"""A client for container registries: streams blobs both ways, and mounts or skips those that are already there.

The protocol is the OCI Distribution Specification 1.1 (Docker's registry 2.8 supports it without the referrers API).
As with Docker, a registry on this machine's loopback is used without TLS, every other one with it. Credentials are
those of ``docker login``.

A registry is not trusted. Every answer is bounded in bytes (compressed answers are refused) and in time, JSON also in
values and depth. An answer that does not conform to the specification is a ``DistributionError``.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, cast

import docker.auth
import docker.errors
import httpx

from containers.errors import ImageError, UnreachableRegistryError
from containers.image.layers import CHUNK
from containers.image.oci import INDEX, MANIFEST
from registry import network
from registry.bounded_json import Bounds, DocumentError, read_json
from registry.digests import digest_of
from registry.errors import NetworkSettingError
from registry.stream import BUSY

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_ACCEPT = f"{MANIFEST}, {DOCKER_MANIFEST}, {INDEX}"
_HUB = ("docker.io", "registry-1.docker.io")
_LOOPBACK = re.compile(r"^(localhost|127(\.\d+){3}|\[::1\])(:\d+)?$")
# Possessive and anchored at the beginning of a word: there is no backtracking.
_CHALLENGE = re.compile(r'\b(\w++)="([^"]*+)"')
# A registry checks and stores a blob before it answers.
_TIMEOUT = httpx.Timeout(30.0, read=600.0, write=600.0)
# The specification requires registries to accept manifests of 4 MiB, not larger ones.
DOCUMENT = Bounds(bytes=4 << 20, values=200_000)
_TOKEN = Bounds(bytes=1 << 20, values=1000, depth=8)
_LONGEST_SHOWN = 200
# Pages of a list of what is attached.
_MOST_PAGES = 100
# The key, in a request's extensions, for the largest size of the blob.
_SIZE = "slipway.size"


class DistributionError(ImageError):
    """A registry can't be reached, refuses a request, or sent something other than what was requested."""


class NoAnswerError(DistributionError, UnreachableRegistryError):
    """A registry can't be reached, or is busy: another try may succeed."""


@dataclass
class Traffic:
    """Bytes of blobs: ``sent`` were uploaded, ``skipped`` and ``mounted`` were already there."""

    sent: int = 0
    skipped: int = 0
    mounted: int = 0
    received: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **moved: int) -> None:
        """Add to the counts; safe between threads."""
        with self._lock:
            for name, count in moved.items():
                setattr(self, name, getattr(self, name) + count)


def parse(reference: str) -> tuple[str, str, str]:
    """Split a reference into registry, repository, and tag or digest (empty if it has neither).

    As with Docker, the first part is a registry if it contains a dot or a colon or is ``localhost``.
    """
    name, at, digest = reference.partition("@")
    first, slash, rest = name.partition("/")
    if not slash or not (set(first) & {".", ":"} or first == "localhost"):
        first, rest = _HUB[0], name if slash else f"library/{name}"
    repository, colon, tag = rest.partition(":")
    return first, repository, digest if at else tag if colon else ""


class Registry:
    """A registry. ``host`` is as in references; ``traffic`` counts the bytes transferred by this object."""

    def __init__(self, host: str) -> None:
        """Make the client; connections are opened on demand."""
        self.host = host
        self.traffic = Traffic()
        self._stopped = threading.Event()
        address = _HUB[1] if host == _HUB[0] else host
        scheme = "http" if _LOOPBACK.match(host) else "https"
        self._base = f"{scheme}://{address}/v2/"
        self._http = httpx.Client(
            base_url=self._base, timeout=_TIMEOUT, auth=_Login(host, self._base), verify=network.tls(),
            proxy=network.proxy_for(self._base), trust_env=False, follow_redirects=True,
            event_hooks={"response": [self._bound]}, headers={"Accept-Encoding": "identity"},
        )  # fmt: skip

    def __enter__(self) -> Self:
        """Use it as a context that closes its connections."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self._http.close()

    def stop(self) -> None:
        """Cancel running uploads in other threads at their next chunk."""
        self._stopped.set()

    def has(self, repository: str, digest: str) -> bool:
        """Whether the repository has a blob."""
        return self._ask("HEAD", f"{repository}/blobs/{digest}", missing=True).status_code == httpx.codes.OK

    def mount(self, repository: str, digest: str, source: str) -> bool:
        """Mount a blob from another repository of the registry; False if the registry did not."""
        parameters = {"mount": digest, "from": source}
        answer = self._ask("POST", f"{repository}/blobs/uploads/", params=parameters)
        if answer.status_code == httpx.codes.CREATED:
            return True
        with contextlib.suppress(DistributionError):  # it opened an upload instead
            self._ask("DELETE", self._location(answer), missing=True)
        return False

    def upload(self, repository: str, chunks: Iterable[bytes], size: int, digest: str | None = None) -> str:
        """Stream a blob of ``size`` bytes and return its digest, computed while streaming if it is not given."""
        seen = hashlib.sha256()

        def counted() -> Iterator[bytes]:
            for chunk in chunks:
                if self._stopped.is_set():
                    raise DistributionError(f"an upload to {self.host} was cancelled because another one failed")
                if digest is None:
                    seen.update(chunk)
                yield chunk
                self.traffic.add(sent=len(chunk))

        begun = self._ask("POST", f"{repository}/blobs/uploads/")
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        streamed = self._ask("PATCH", self._location(begun), headers=headers, content=counted())
        final = digest or f"sha256:{seen.hexdigest()}"
        self._ask("PUT", self._location(streamed).copy_merge_params({"digest": final}), headers={"Content-Length": "0"})
        return final

    def put_blob(self, repository: str, data: bytes) -> str:
        """Store a small blob, unless it is there; return its digest."""
        digest = digest_of(data)
        if self.has(repository, digest):
            self.traffic.add(skipped=len(data))
            return digest
        return self.upload(repository, [data], len(data), digest)

    def put_manifest(self, repository: str, name: str, data: bytes, media_type: str = MANIFEST) -> str:
        """Store a manifest under a tag or its digest; return the registry's digest of it.

        Raises:
            DistributionError: the registry returns another digest.
        """
        answer = self._ask(
            "PUT", f"{repository}/manifests/{name}", content=data, headers={"Content-Type": media_type}
        )  # fmt: skip
        self.traffic.add(sent=len(data))
        stored, ours = answer.headers.get("Docker-Content-Digest", digest_of(data)), digest_of(data)
        if stored != ours:
            raise DistributionError(f"{self.host}/{repository} stored {ours} as {stored}")
        return ours

    def manifest(self, repository: str, name: str) -> tuple[bytes, str] | None:
        """Return a manifest's bytes and media type; None if it does not exist.

        Raises:
            DistributionError: the manifest does not have the requested digest.
        """
        answer = self._ask("GET", f"{repository}/manifests/{name}", headers={"Accept": _ACCEPT}, missing=True)
        if answer.status_code != httpx.codes.OK:
            return None
        self.traffic.add(received=len(answer.content))
        if name.startswith("sha256:") and digest_of(answer.content) != name:
            raise DistributionError(f"{self.host}/{repository}@{name} has the digest {digest_of(answer.content)}")
        return answer.content, answer.headers.get("Content-Type", MANIFEST)

    def blob(self, repository: str, digest: str, size: int) -> Iterator[bytes]:
        """Stream a blob of at most ``size`` bytes; the caller checks its digest."""
        path = f"{repository}/blobs/{digest}"
        with self._explained(), self._http.stream("GET", path, extensions={_SIZE: size}) as answer:
            if answer.status_code != httpx.codes.OK:
                answer.read()
                raise self._refusal(answer, path)
            for chunk in answer.iter_raw(CHUNK):
                self.traffic.add(received=len(chunk))
                yield chunk

    def part(self, repository: str, digest: str, start: int, end: int) -> Iterator[bytes]:
        """Stream the bytes of a blob from ``start`` to before ``end``; nobody checks their digest.

        If the registry has no range requests, what comes before ``start`` is received, too.
        """
        path, limit = f"{repository}/blobs/{digest}", {_SIZE: end + CHUNK}  # for the piece that has the last byte
        headers = {"Range": f"bytes={start}-{end - 1}"}
        with self._explained(), self._http.stream("GET", path, headers=headers, extensions=limit) as answer:
            if answer.status_code not in {httpx.codes.OK, httpx.codes.PARTIAL_CONTENT}:
                answer.read()
                raise self._refusal(answer, path)
            at = start if answer.status_code == httpx.codes.PARTIAL_CONTENT else 0
            for chunk in answer.iter_raw():  # as it arrives, so that nothing of it is lost if the connection breaks
                self.traffic.add(received=len(chunk))
                if found := chunk[max(0, start - at) : end - at]:
                    yield found
                at += len(chunk)
                if at >= end:
                    return

    def put_referrer(self, repository: str, data: bytes) -> bool:
        """Store a manifest that has a ``subject``; return whether the registry itself lists it as a referrer."""
        answer = self._ask(
            "PUT", f"{repository}/manifests/{digest_of(data)}", content=data, headers={"Content-Type": MANIFEST}
        )
        self.traffic.add(sent=len(data))
        return "OCI-Subject" in answer.headers

    def referrers(self, repository: str, digest: str) -> list[bytes] | None:
        """Return the pages of the index of what refers to a manifest; None if the registry has no referrers API.

        Raises:
            DistributionError: there are more pages than are read, or the next one is at another host.
        """
        pages: list[bytes] = []
        where: str | httpx.URL = f"{repository}/referrers/{digest}"
        while len(pages) < _MOST_PAGES:
            answer = self._ask("GET", where, missing=True)
            if answer.status_code != httpx.codes.OK:
                return pages or None
            pages.append(answer.content)
            following = answer.links.get("next", {}).get("url")
            if following is None:
                return pages
            where = self._at(answer, following, "a list")
        raise DistributionError(f"the registry {self.host} lists what is attached on more than {_MOST_PAGES} pages")

    def _location(self, answer: httpx.Response) -> httpx.URL:
        """Return the address at which to continue an upload, which must be at this registry."""
        if "Location" not in answer.headers:
            raise DistributionError(f"the registry {self.host} sent no `Location` for an upload")
        return self._at(answer, answer.headers["Location"], "an upload")

    def _at(self, answer: httpx.Response, location: str, what: str) -> httpx.URL:
        """Return the address at which to continue, which must be at this registry."""
        there = self._joined(answer, location)
        if not network.same_origin(self._base, str(there)):
            where = f"another host, {there.host}" if there.host != httpx.URL(self._base).host else f"{there}"[:200]
            raise DistributionError(f"the registry {self.host} redirects {what} to {where}: refused")
        return there

    def _bound(self, answer: httpx.Response) -> None:
        """Check an answer's headers before the body is read, also for redirects and token services; limit the body."""
        there = str(self._there(answer)) if answer.has_redirect_location else None
        encoding = answer.headers.get("Content-Encoding", "")
        problem = network.answer_problem(answer.request.method, str(answer.url), there, encoding)
        if problem is not None:
            raise DistributionError(f"the registry {self.host} {problem}")
        size = answer.request.extensions.get(_SIZE) if answer.is_success else None
        answer.stream = _Bounded(cast("httpx.SyncByteStream", answer.stream), size, self.host)

    def _ask(self, method: str, path: str | httpx.URL, *, missing: bool = False, **rest: Any) -> httpx.Response:  # noqa: ANN401 - httpx's own
        with self._explained():
            answer = self._http.request(method, path, **rest)
        if answer.is_success or (missing and answer.status_code == httpx.codes.NOT_FOUND):
            return answer
        raise self._refusal(answer, str(path))

    def _there(self, answer: httpx.Response) -> httpx.URL:
        return self._joined(answer, answer.headers["Location"])

    def _joined(self, answer: httpx.Response, location: str) -> httpx.URL:
        try:
            there = answer.url.join(location)
            _ = there.host  # decoding fails if it is not a valid name
        except (httpx.InvalidURL, ValueError) as error:
            raise DistributionError(f"the registry {self.host} redirects to a malformed address: refused") from error
        return there

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> DistributionError:
        words = " ".join(str(error).split()) or type(error).__name__
        return NoAnswerError(f"the registry {self.host} can't be reached: {words}")

    def _refusal(self, answer: httpx.Response, path: str) -> DistributionError:
        # Not `answer.text`, which decodes with the codec that the answer names, and zlib is a codec too.
        words = " ".join(answer.content.decode(errors="replace").split())[:_LONGEST_SHOWN] or answer.reason_phrase
        where = str(path).partition("?")[0]
        renew = f"; renew the credentials: `docker login {self.host}`" if answer.status_code == 401 else ""
        kind = NoAnswerError if answer.status_code in BUSY else DistributionError
        return kind(f"the registry {self.host} answers {answer.status_code} for {where}: {words}{renew}")


class _Bounded(httpx.SyncByteStream):
    """The body of an answer, with a size limit: a document, or a blob of at most ``size`` bytes."""

    def __init__(self, body: httpx.SyncByteStream, size: int | None, host: str) -> None:
        self._body = body
        self._size = size
        self._host = host

    def __iter__(self) -> Iterator[bytes]:
        try:
            if self._size is None:
                yield from network.within(self._body, DOCUMENT.bytes, network.ANSWER_SECONDS)
                return
            pace = network.Pace()
            for chunk in network.within(self._body, self._size, math.inf):
                pace.add(len(chunk))
                yield chunk
        except NetworkSettingError as error:
            raise DistributionError(f"the registry {self._host} {error}") from error

    def close(self) -> None:
        self._body.close()


class _Login(httpx.Auth):
    """Authentication after a registry's challenge: basic, or a token from the service named in it.

    Challenges of hosts to which the registry redirects are ignored. The service gets user and password only over TLS
    and only if it is in the registry's domain. Any other is asked for an anonymous token, which public images accept.
    """

    def __init__(self, host: str, base: str) -> None:
        self._host = host
        self._base = base
        self._header: str | None = None

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send the request with the known authorization, and again after a challenge."""
        if self._header:
            request.headers["Authorization"] = self._header
        answer = yield request
        if answer.status_code != httpx.codes.UNAUTHORIZED or not network.same_origin(self._base, str(answer.url)):
            return
        scheme, _, rest = answer.headers.get("WWW-Authenticate", "").partition(" ")
        known = self._known()
        name, word = known.get("username") or known.get("Username"), known.get("password") or known.get("Password")
        basic = httpx.BasicAuth(name, word) if name and word else None
        if scheme.lower() == "basic" and basic is not None:
            self._header = next(basic.auth_flow(httpx.Request("GET", request.url))).headers["Authorization"]
        elif scheme.lower() == "bearer":
            asked = self._token_request(dict(_CHALLENGE.findall(rest)), request.extensions.get("timeout"))
            if asked is None:
                return
            trusted = self._belongs(asked.url)
            token = yield next(basic.auth_flow(asked)) if basic and trusted else asked
            token.read()
            self._header = _bearer(token)
            if self._header is None:  # otherwise httpx would return the service's answer as the registry's
                where = f"{asked.url.host} answers {token.status_code}"
                if basic and not trusted:
                    where += ", requested without user and password, which are sent to the registry's own domain only"
                raise DistributionError(f"the token service of the registry {self._host} gave no token: {where}")
        else:
            return
        request.headers["Authorization"] = self._header
        yield request

    def _known(self) -> Mapping[str, str]:
        """Read the registry's credentials of ``docker login``."""
        try:
            return docker.auth.load_config().resolve_authconfig(None if self._host == _HUB[0] else self._host) or {}
        except docker.errors.DockerException as error:  # the credential helper is missing or failed
            words = " ".join(str(error).split())[:_LONGEST_SHOWN]
            raise DistributionError(
                f"can't read the credentials of `docker login` for {self._host}: {words}"
            ) from error

    def _token_request(self, challenge: Mapping[str, str], timeout: object) -> httpx.Request | None:
        try:
            realm = httpx.URL(challenge["realm"])
            host = realm.host  # decoding fails if it is not a valid name
        except (KeyError, httpx.InvalidURL, ValueError):
            return None
        if realm.scheme != "https" and not (realm.scheme == "http" and network.is_loopback(host)):
            return None
        parameters = {key: challenge[key] for key in ("service", "scope") if key in challenge}
        headers, extensions = {"Accept-Encoding": "identity"}, {"timeout": timeout}
        return httpx.Request("GET", realm, params=parameters, headers=headers, extensions=extensions)

    def _belongs(self, realm: httpx.URL) -> bool:
        """Whether a token service is in the registry's domain, such as auth.example.com for registry.example.com."""
        own = httpx.URL(self._base).host
        if realm.host == own:
            return True
        _, _, domain = own.partition(".")
        named = "." in domain and not domain.rpartition(".")[2].isdigit()
        return named and (realm.host == domain or realm.host.endswith(f".{domain}"))


def _bearer(answer: httpx.Response) -> str | None:
    try:
        document = read_json(answer.content, _TOKEN) if answer.is_success else {}
        found = document.get("token") or document["access_token"]
        return f"Bearer {network.token('the token of the registry', found)}" if isinstance(found, str) else None
    except (DocumentError, AttributeError, KeyError, NetworkSettingError):
        return None
