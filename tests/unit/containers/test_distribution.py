"""Credentials of a container registry stay with it, whatever it, or who it redirects to, asks for."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from recording_server import Answer, Asked, Recording, recording

from containers.image.distribution import DistributionError, Registry, _Login

BASIC = f"Basic {base64.b64encode(b'ann:word').decode()}"
DIGEST = "sha256:" + "a" * 64


@pytest.fixture
def elsewhere() -> Iterator[Recording]:
    """Another host of this machine."""
    with recording("127.0.0.2") as started:
        yield started


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recording]:
    """A registry that ``docker login`` knows a user and a password of."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with recording() as started:
        known = {"auths": {_host(started): {"auth": BASIC.removeprefix("Basic ")}}}
        (tmp_path / "config.json").write_text(json.dumps(known))
        yield started


def _host(started: Recording) -> str:
    return started.address.removeprefix("http://")


def asks_for_a_token(realm: str, headers: dict[str, str] | None = None) -> Answer:
    return Answer(401, {"WWW-Authenticate": f'Bearer realm="{realm}",service="s",scope="x"', **(headers or {})})


def test_the_registry_itself_gets_them(registry: Recording) -> None:
    def answer(asked: Asked) -> Answer:
        if asked.target.startswith("/token"):
            return Answer(body=b'{"token": "abc"}')
        known = asked.headers.get("Authorization") == "Bearer abc"
        return Answer(200) if known else asks_for_a_token(f"{registry.address}/token")

    registry.answer = answer
    with Registry(_host(registry)) as mine:
        assert mine.has("demo", DIGEST)
    assert registry.authorizations() == [BASIC, "Bearer abc"]


def test_a_token_service_of_another_host_is_asked_without_them(registry: Recording, elsewhere: Recording) -> None:
    registry.answer = lambda _: asks_for_a_token(f"{elsewhere.address}/token")
    elsewhere.answer = lambda _: Answer(body=b'{"token": "abc"}')
    with Registry(_host(registry)) as mine, pytest.raises(DistributionError, match="401"):
        mine.has("demo", DIGEST)
    assert [asked.target for asked in elsewhere.asked] == ["/token?service=s&scope=x"]
    assert elsewhere.authorizations() == []


def test_why_another_token_service_gives_nothing_is_said(registry: Recording, elsewhere: Recording) -> None:
    registry.answer = lambda _: asks_for_a_token(f"{elsewhere.address}/token")
    elsewhere.answer = lambda _: Answer(401)
    with (
        Registry(_host(registry)) as mine,
        pytest.raises(DistributionError, match=r"127\.0\.0\.2 answers 401, requested without user and password"),
    ):
        mine.has("demo", DIGEST)


@pytest.mark.filterwarnings("ignore:docker-credential")
def test_a_program_that_keeps_credentials_and_is_not_there_is_an_error_of_the_registry(
    registry: Recording, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"credsStore": "none-of-this-machine"}')
    registry.answer = lambda _: Answer(401, {"WWW-Authenticate": "Basic realm=x"})
    with (
        Registry(_host(registry)) as mine,
        pytest.raises(DistributionError, match="credentials of `docker login` for 127"),
    ):
        mine.has("demo", DIGEST)


@pytest.mark.parametrize("realm", ["http://registry.example.com/token", "ftp://x/", "", "http://[", "/token"])
def test_a_token_service_that_is_none_is_not_asked(registry: Recording, realm: str) -> None:
    registry.answer = lambda _: asks_for_a_token(realm)
    with Registry(_host(registry)) as mine, pytest.raises(DistributionError, match="401"):
        mine.has("demo", DIGEST)
    assert registry.authorizations() == []


@pytest.mark.parametrize("body", [b"{}", b"junk", b"[]", b'{"token": "a\\nb"}', b'{"token": null}'])
def test_a_token_that_is_none_ends_in_a_refusal(registry: Recording, body: bytes) -> None:
    token = f"{registry.address}/token"
    registry.answer = lambda asked: Answer(body=body) if "/token" in asked.target else asks_for_a_token(token)
    with Registry(_host(registry)) as mine, pytest.raises(DistributionError, match="gave no token"):
        mine.has("demo", DIGEST)


@pytest.mark.parametrize("challenge", ["Basic realm=x", 'Bearer realm="{}/token"'])
def test_who_it_redirects_to_gets_none_though_it_asks(
    registry: Recording, elsewhere: Recording, challenge: str
) -> None:
    def answer(asked: Asked) -> Answer:
        if asked.headers.get("Authorization") != BASIC:
            return Answer(401, {"WWW-Authenticate": "Basic realm=x"})
        return Answer(307, {"Location": f"{elsewhere.address}/blob"})

    registry.answer = answer
    asking = {"WWW-Authenticate": challenge.format(elsewhere.address)}
    elsewhere.answer = lambda _: Answer(401, asking)
    with Registry(_host(registry)) as mine, pytest.raises(DistributionError, match="401"):
        b"".join(mine.blob("demo", DIGEST, 5))
    assert [asked.target for asked in elsewhere.asked] == ["/blob"]
    assert elsewhere.authorizations() == []


@pytest.mark.parametrize("there", ["http://[::1", "http://a:99999/x", "http://a:x/", "http://\x7f/"])
def test_a_malformed_address_is_an_error_of_the_registry(registry: Recording, there: str) -> None:
    for status in (307, 202):
        registry.answer = lambda _, status=status: Answer(status, {"Location": there})  # type: ignore[misc]
        with Registry(_host(registry)) as mine, pytest.raises(DistributionError):
            mine.upload("demo", [b"layer"], 5)


def test_a_blob_that_lies_elsewhere_is_read_there(registry: Recording, elsewhere: Recording) -> None:
    registry.answer = lambda _: Answer(307, {"Location": f"{elsewhere.address}/blob"})
    elsewhere.answer = lambda _: Answer(body=b"layer")
    with Registry(_host(registry)) as mine:
        assert b"".join(mine.blob("demo", DIGEST, 5)) == b"layer"


def test_an_upload_goes_to_no_other_host(registry: Recording, elsewhere: Recording) -> None:
    registry.answer = lambda _: Answer(202, {"Location": f"{elsewhere.address}/upload"})
    with (
        Registry(_host(registry)) as mine,
        pytest.raises(DistributionError, match="redirects an upload to another host"),
    ):
        mine.upload("demo", [b"layer"], 5)
    other_port = f"http://127.0.0.1:{int(registry.address.rpartition(':')[2]) ^ 1}/upload"
    registry.answer = lambda _: Answer(202, {"Location": other_port})
    with (
        Registry(_host(registry)) as mine,
        pytest.raises(DistributionError, match=f"redirects an upload to {other_port}"),
    ):
        mine.upload("demo", [b"layer"], 5)
    registry.answer = lambda _: Answer(307, {"Location": f"{elsewhere.address}/upload"})
    with Registry(_host(registry)) as mine, pytest.raises(DistributionError, match=r"redirects what is written"):
        mine.upload("demo", [b"layer"], 5)
    registry.answer = lambda _: Answer(202)
    with Registry(_host(registry)) as mine, pytest.raises(DistributionError):
        mine.upload("demo", [b"layer"], 5)
    assert elsewhere.asked == []


@pytest.mark.parametrize(
    ("host", "realm", "belongs"),
    [
        ("registry-1.docker.io", "auth.docker.io", True),
        ("registry.gitlab.com", "gitlab.com", True),
        ("ghcr.io", "ghcr.io", True),
        ("ghcr.io", "evil.io", False),
        ("registry.example.com", "example.com.evil.org", False),
        ("registry.example.com", "evilexample.com", False),
        ("10.0.0.1", "9.0.0.1", False),
        ("127.0.0.1", "127.0.0.2", False),
    ],
)
def test_which_token_services_are_a_registrys_own(host: str, realm: str, *, belongs: bool) -> None:
    assert _Login(host, f"https://{host}/v2/")._belongs(httpx.URL(f"https://{realm}/token")) == belongs
