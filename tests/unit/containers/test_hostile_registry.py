"""A container registry that means harm: every answer is bounded, and ends in one line that names the registry."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from recording_server import Answer, Asked, Recording, recording, trickle

from containers.errors import ImageError, UnreachableRegistryError
from containers.image import base, distribution, referrers
from containers.image.blobs import BlobStore
from containers.image.distribution import DistributionError, Registry
from registry import network
from registry.digests import digest_of

DIGEST = "sha256:" + "a" * 64
LAYER = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest_of(b"layer"), "size": 5}
Ask = Callable[[Registry], object]
ASKED: dict[str, Ask] = {
    "manifest": lambda registry: registry.manifest("demo", "1"),
    "referrers": lambda registry: referrers.referrers(registry, "demo", DIGEST),
    "blob": lambda registry: b"".join(registry.blob("demo", DIGEST, 1000)),
    "upload": lambda registry: registry.upload("demo", [b"layer"], 5),
}


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recording]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with recording() as started:
        yield started


def host(started: Recording) -> str:
    return started.address.removeprefix("http://")


def refusal(started: Recording, asked: Ask, answer: Answer | Callable[[Asked], Answer]) -> str:
    """Ask, and return the one line of the error that follows."""
    started.answer = answer if callable(answer) else lambda _: answer
    with Registry(host(started)) as registry, pytest.raises(DistributionError) as caught:
        asked(registry)
    assert host(started) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_part_is_had_of_a_registry_without_range_requests(hostile: Recording) -> None:
    blob = bytes(range(256)) * 10_000
    hostile.answer = lambda _: Answer(body=blob)
    with Registry(host(hostile)) as registry:
        assert b"".join(registry.part("demo", digest_of(blob), 1_000, 100_000)) == blob[1_000:100_000]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_a_registry_that_is_busy_may_be_asked_again(hostile: Recording, asked: Ask, status: int) -> None:
    hostile.answer = lambda _: Answer(status)
    with Registry(host(hostile)) as registry, pytest.raises(UnreachableRegistryError, match=f"answers {status}"):
        asked(registry)


@pytest.mark.parametrize("status", [200, 307, 500])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_a_compressed_answer_is_not_unpacked(hostile: Recording, asked: Ask, status: int) -> None:
    bomb = Answer(status, {"Content-Encoding": "gzip", "Location": "/v2/"}, gzip.compress(b" " * (32 << 20)))
    tracemalloc.start()
    said = refusal(hostile, asked, bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "sent a compressed answer" in said
    assert peak < 8 << 20


@pytest.mark.parametrize("status", [200, 307, 500])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_an_endless_answer_is_not_read_to_its_end(hostile: Recording, asked: Ask, status: int) -> None:
    endless = itertools.repeat(b"x" * 65536)
    said = refusal(hostile, asked, lambda _: Answer(status, {"Location": f"{hostile.address}/v2/x"}, endless))
    assert "sent more than" in said


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_an_answer_has_a_longest_time(hostile: Recording, asked: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "ANSWER_SECONDS", 0.1)
    said = refusal(hostile, asked, lambda _: Answer(body=trickle()))
    assert "took more than 0.1 s" in said or "too slow" in said


def test_a_token_service_is_bounded_like_the_registry(hostile: Recording) -> None:
    challenge = {"WWW-Authenticate": f'Bearer realm="{hostile.address}/token"'}

    def answer(asked: Asked) -> Answer:
        return Answer(body=itertools.repeat(b"x" * 65536)) if "/token" in asked.target else Answer(401, challenge)

    assert "sent more than" in refusal(hostile, ASKED["manifest"], answer)
    deep = b'{"token":' + b"[" * 100_000
    assert "gave no token" in refusal(
        hostile,
        ASKED["manifest"],
        lambda asked: Answer(body=deep) if "/token" in asked.target else Answer(401, challenge),
    )


def test_a_token_service_that_does_not_answer_is_not_waited_for(
    hostile: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distribution, "_TIMEOUT", httpx.Timeout(0.2))
    over = threading.Event()

    def answer(asked: Asked) -> Answer:
        if "/token" in asked.target:
            over.wait(60)
            return Answer(body=b'{"token": "abc"}')
        return Answer(401, {"WWW-Authenticate": f'Bearer realm="{hostile.address}/token"'})

    assert "can't be reached" in refusal(hostile, ASKED["manifest"], answer)
    over.set()


def test_a_blob_has_the_size_that_its_manifest_says(hostile: Recording) -> None:
    assert "sent more than 1000 bytes" in refusal(hostile, ASKED["blob"], Answer(body=b"x" * 1001))


@pytest.mark.parametrize("charset", ["zlib", "base64", "bz2", "rot13", "no-such"])
def test_a_refusal_is_not_decoded_as_it_asks_for(hostile: Recording, charset: str) -> None:
    packed = zlib.compress(b" " * (8 << 20))
    answer = Answer(500, {"Content-Type": f"text/plain; charset={charset}"}, packed)
    assert "answers 500" in refusal(hostile, ASKED["manifest"], answer)


@pytest.mark.parametrize("location", ["http://[", "http://xn--a/", "http://x:99999/", "http://\xff/", "\x01"])
@pytest.mark.parametrize(("asked", "status"), [("manifest", 307), ("blob", 302), ("upload", 202)])
def test_a_location_that_is_no_address_is_not_followed(
    hostile: Recording, location: str, asked: str, status: int
) -> None:
    refusal(hostile, ASKED[asked], Answer(status, {"Location": location}))


@pytest.mark.parametrize("realm", ["https://xn--a/", "http://xn--a/", "https://x:99999/", "a" * 60_000])
def test_a_realm_that_is_no_address_is_not_asked(hostile: Recording, realm: str) -> None:
    refusal(hostile, ASKED["manifest"], Answer(401, {"WWW-Authenticate": f'Bearer realm="{realm}"'}))


def test_a_challenge_without_end_is_read_once(hostile: Recording) -> None:
    """Looked at anew from each of its characters, it would take the square of its length."""
    refusal(hostile, ASKED["manifest"], Answer(401, {"WWW-Authenticate": "Bearer " + "a" * 60_000}))


WRONG = [
    b"", b"null", b"[]", b"3", b"<html>", b"\xff", b"[" * 100_000, b'{"manifests":' * 5_000,
    b'{"manifests": 3}', b'{"manifests": [3]}', b'{"manifests": [{}]}', b'{"manifests": [{"digest": "../../x"}]}',
    b'{"manifests": [' + b"{}," * 300_000 + b"{}]}",
]  # fmt: skip


@pytest.mark.parametrize("body", WRONG, ids=lambda body: repr(body[:30]))
def test_a_list_of_what_is_attached_has_its_form_or_is_refused(hostile: Recording, body: bytes) -> None:
    assert "lists what is attached" in refusal(hostile, ASKED["referrers"], Answer(body=body))


@pytest.mark.parametrize(
    ("following", "why"),
    [
        ("http://elsewhere.example/v2/", "redirects a list to another host, elsewhere.example: refused"),
        ("/v2/demo/referrers/again", "lists what is attached on more than 100 pages"),
    ],
)
def test_a_list_goes_on_at_the_registry_alone_and_has_an_end(hostile: Recording, following: str, why: str) -> None:
    page = Answer(headers={"Link": f'<{following}>; rel="next"'}, body=b'{"manifests": []}')
    assert why in refusal(hostile, ASKED["referrers"], page)


def a_manifest(**changes: object) -> bytes:
    config = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": DIGEST, "size": 2}
    return json.dumps({"config": config, "layers": [LAYER], **changes}).encode()


MANIFESTS = [
    *WRONG,
    b'{"manifests": []}',
    a_manifest(config=None),
    a_manifest(config={"digest": "sha256:../../x", "size": 1}),
    a_manifest(layers={"a": 1}),
    a_manifest(layers=[{**LAYER, "digest": f"sha256:{'A' * 64}"}]),
    a_manifest(layers=[{**LAYER, "size": -1}]),
    a_manifest(layers=[{**LAYER, "size": 1 << 60}]),
    a_manifest(layers=[{**LAYER, "size": "5"}]),
    a_manifest(layers=[LAYER] * 501),
    json.dumps({"manifests": [{**LAYER, "platform": {"os": "linux", "architecture": ["amd64"]}}]}).encode(),
]


def fetched(hostile: Recording, folder: Path, manifest: bytes, configuration: bytes = b"{}") -> str:
    """Fetch a base of this manifest and this configuration, and return the error's line."""

    def answer(asked: Asked) -> Answer:
        if "/manifests/" in asked.target:
            return Answer(body=manifest)
        return Answer(body=b"layer" if digest_of(b"layer") in asked.target else configuration)

    hostile.answer = answer
    with pytest.raises(ImageError) as caught:
        base._fetched(f"{host(hostile)}/demo@{digest_of(manifest)}", BlobStore(folder), lambda _: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda body: hashlib.sha256(body).hexdigest()[:8])
def test_a_manifest_has_its_form_or_is_refused(hostile: Recording, tmp_path: Path, manifest: bytes) -> None:
    fetched(hostile, tmp_path, manifest)
    assert not (tmp_path / "bases").exists()


CONFIGURATIONS = [
    {},
    {"rootfs": {"diff_ids": []}},
    {"rootfs": {"diff_ids": ["sha256:x"]}},
    {"rootfs": {"diff_ids": [DIGEST]}, "config": {"Env": "PATH=/bin"}},
    {"rootfs": {"diff_ids": [DIGEST]}, "config": {"Labels": {"a": 1}}},
]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_a_configuration_has_its_form_or_is_refused(
    hostile: Recording, tmp_path: Path, configuration: dict[str, object]
) -> None:
    data = json.dumps(configuration).encode()
    fetched(hostile, tmp_path, a_manifest(config={"digest": digest_of(data), "size": len(data)}), data)


def test_an_index_that_leads_to_an_index_is_followed_no_further(hostile: Recording, tmp_path: Path) -> None:
    amd64 = {"os": "linux", "architecture": "amd64"}
    index = json.dumps({"manifests": [{**LAYER, "platform": amd64, "digest": DIGEST}]}).encode()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distribution, "digest_of", lambda _: DIGEST)  # a chain of them, without an end
        hostile.answer = lambda _: Answer(body=index)
        with pytest.raises(ImageError, match="no image for linux/amd64"):
            base._fetched(f"{host(hostile)}/demo@{DIGEST}", BlobStore(tmp_path), lambda _: None)
    assert len(hostile.asked) == 2
