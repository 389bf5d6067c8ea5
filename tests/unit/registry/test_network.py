"""The policy for HTTP: certificates, proxies, redirects and tokens, as each client of the registry keeps to it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from recording_server import Answer, Recording, own_certificate, recording

from containers.image.distribution import Registry
from pipeline.workers.launchers.http import client
from registry import network
from registry.download import InterruptedStreamError
from registry.errors import NetworkSettingError, TrackingError
from registry.network import proxy_for, redirect_problem, same_origin, tls
from registry.server import MlflowServer
from registry.stream import stream
from registry.tracking import reach, with_credentials

EMPTY = Answer(200, {"Content-Type": "application/json"}, b'{"registered_models": []}')
VARIABLES = (
    "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_TOKEN",
)  # fmt: skip


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that says nothing of the network."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def server() -> Iterator[Recording]:
    with recording() as started:
        started.answer = lambda _: EMPTY
        yield started


@pytest.fixture
def over_tls(tmp_path: Path) -> Iterator[tuple[Recording, Path]]:
    certificate = own_certificate(tmp_path / "server.pem")
    with recording(certificate=certificate) as started:
        started.answer = lambda _: EMPTY
        yield started, certificate


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_server_is_believed_by_the_authorities_that_a_variable_names(
    over_tls: tuple[Recording, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, certificate = over_tls
    with MlflowServer(started.address) as server, pytest.raises(TrackingError, match=r"(?i)certificate"):
        server.names()
    with pytest.raises(InterruptedStreamError, match=r"(?i)certificate"), stream(f"{started.address}/x", {}, 0):
        pass
    assert not started.asked
    monkeypatch.setenv(name, str(certificate))
    with MlflowServer(started.address) as server:
        assert server.names() == []
    with stream(f"{started.address}/x", {}, 0, network.MLFLOW_AUTHORITIES) as (reader, _):
        assert reader.readinto(memoryview(bytearray(99))) == len(
            b"".join(EMPTY.body) if not isinstance(EMPTY.body, bytes) else EMPTY.body
        )


@pytest.mark.parametrize("content", [None, b"junk"])
def test_a_file_that_holds_no_certificate_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "ca.pem").write_bytes(content)
    with pytest.raises(NetworkSettingError, match=r"`REQUESTS_CA_BUNDLE` names `.*ca\.pem`, which can't be used"):
        tls(environment={"REQUESTS_CA_BUNDLE": str(tmp_path / "ca.pem")})


def test_the_servers_own_authorities_count_before_the_common_ones(tmp_path: Path) -> None:
    environment = {"REQUESTS_CA_BUNDLE": str(tmp_path / "no"), "MLFLOW_TRACKING_SERVER_CERT_PATH": str(tmp_path)}
    assert tls("MLFLOW_TRACKING_SERVER_CERT_PATH", environment=environment)
    with pytest.raises(NetworkSettingError, match="REQUESTS_CA_BUNDLE"):
        tls(environment=environment)


def test_what_is_far_is_asked_through_the_proxy(server: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.address.replace("//", "//ann:w%40rd@"))
    reach("http://mlflow.invalid:5000")  # it is the proxy that knows the name
    with MlflowServer("http://mlflow.invalid:5000") as far:
        assert far.names() == []
    with stream("http://mlflow.invalid:5000/files/x?y=1", {}, 0) as (reader, _):
        assert reader.readinto(memoryview(bytearray(99)))
    assert server.asked[0].target.startswith("http://mlflow.invalid:5000/api/2.0/mlflow/registered-models/search")
    assert server.asked[1].target == "http://mlflow.invalid:5000/files/x?y=1"
    known = base64.b64encode(b"ann:w@rd").decode()
    assert [asked.headers["Proxy-Authorization"] for asked in server.asked] == [f"Basic {known}"] * 2
    monkeypatch.setenv("NO_PROXY", "other.invalid, .invalid")
    with pytest.raises(TrackingError, match="no MLflow server answers"):
        reach("http://mlflow.invalid:5000")


def test_this_machine_is_never_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "proxy.invalid:3128")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    assert proxy_for("http://far.invalid/x") == "http://proxy.invalid:3128"
    assert proxy_for("https://far.invalid/x") == "http://proxy.invalid:3128"
    for here in ("http://localhost:1", "http://127.0.0.9:1", "https://[::1]:1"):
        assert proxy_for(here) is None


def test_a_tunnel_is_asked_of_the_proxy_for_https(server: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", server.address)
    opened, path, headers = network.connection("https://far.invalid:8443/x?y", 5.0)
    assert (opened.host, path, headers) == ("127.0.0.1", "/x?y", {})
    assert (opened._tunnel_host, opened._tunnel_port) == ("far.invalid", 8443)  # type: ignore[attr-defined]


def test_a_tunnel_is_asked_of_no_proxy_that_is_to_be_reached_over_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would get its password in the clear."""
    monkeypatch.setenv("HTTPS_PROXY", "https://ann:word@proxy.invalid:1")
    with pytest.raises(NetworkSettingError, match="a `https` proxy can't be used"):
        network.connection("https://far.invalid/x", 5.0)


def test_a_proxy_learns_no_user_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    assert network.connection("http://ann:word@far.invalid:8/x?y#z", 5.0)[1] == "http://far.invalid:8/x?y"


MALFORMED = [
    "http://ann:word@far.invalid:99999/x", "http://ann:word@far.invalid:0/x", "http://ann:wo/word@far.invalid/x",
    "http://ann:word@[::1", "https://ann:word@far\u2100/x", f"https://ann:word@{'a' * 64}.invalid/x",
    "https://ann:word@.invalid/x",
]  # fmt: skip


@pytest.mark.parametrize("address", MALFORMED)
def test_a_malformed_address_is_refused_and_its_password_not_shown(address: str) -> None:
    for asked in (lambda: network.connection(address, 5.0), lambda: proxy_for(address)):
        with pytest.raises(NetworkSettingError, match="host or the port of an address is malformed") as caught:
            asked()
        assert "wo" not in str(caught.value)
        assert caught.value.__cause__ is None
    assert not same_origin(address, address)
    assert redirect_problem("GET", "http://far.invalid/", address) is not None


@pytest.mark.parametrize("address", ["http://ann:word@[::1", "https://ann:word@far\u2100.invalid"])
def test_a_malformed_address_of_the_registry_is_named_by_its_variable(address: str) -> None:
    for asked in (lambda: reach(address), lambda: MlflowServer(address), lambda: with_credentials(address, {})):
        with pytest.raises(TrackingError, match=r"the host in `MLFLOW_TRACKING_URI` .* is malformed") as caught:
            asked()
        assert "word" not in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize("address", ["http://far.invalid/\u00e9", "http://far.invalid/a b", "http://far.invalid/?\x7f"])
def test_an_address_that_no_request_carries_is_refused(address: str) -> None:
    with pytest.raises(NetworkSettingError, match="must be escaped"), stream(address, {}, 0):
        pass


@pytest.mark.parametrize("address", ["ftp://ann:word@far.invalid/x?key=word", "https:///x"])
def test_an_address_of_another_scheme_is_refused_without_its_password(address: str) -> None:
    with pytest.raises(NetworkSettingError, match="addresses can't be read") as caught:
        network.connection(address, 5.0)
    assert "word" not in str(caught.value)


@pytest.mark.parametrize("proxy", ["proxy.invalid:99999", "http://[proxy"])
def test_a_malformed_proxy_is_refused(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(NetworkSettingError, match="malformed"):
        proxy_for("https://far.invalid/x")


@pytest.mark.parametrize("proxy", ["socks5://proxy.invalid:1", "ftp://proxy.invalid", "http://"])
def test_a_proxy_that_is_none_of_https_is_refused_by_every_client(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    far = "https://far.invalid"
    for asked in (
        lambda: network.connection(far, 5.0),
        lambda: MlflowServer(far),
        lambda: Registry("far.invalid"),
        lambda: client(far),
    ):
        with pytest.raises(NetworkSettingError, match="proxy can't be used: set HTTPS_PROXY to http://HOST:PORT"):
            asked()


def test_where_a_server_redirects_its_address_is_to_be_set(server: Recording) -> None:
    server.answer = lambda _: Answer(301, {"Location": "https://mlflow.example/"})
    with MlflowServer(server.address) as asked:
        with pytest.raises(TrackingError, match=r"redirects \(301\), .* set `MLFLOW_TRACKING_URI` to where it leads"):
            asked.names()
        assert asked.presigned("x") is None


def test_a_token_is_sent_where_no_user_is(server: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", " abc.DEF-123\n")
    with MlflowServer(server.address) as mine:
        mine.names()
    with MlflowServer(server.address.replace("//", "//ann:word@")) as anns:
        anns.names()
    known = base64.b64encode(b"ann:word").decode()
    assert server.authorizations() == ["Bearer abc.DEF-123", f"Basic {known}"]


@pytest.mark.parametrize("value", ["secret\nX: y", "sec ret", "sécret", "secret\x00"])
def test_a_token_that_no_header_carries_is_refused_and_not_shown(value: str) -> None:
    with pytest.raises(NetworkSettingError, match="`MLFLOW_TRACKING_TOKEN` holds a character") as caught:
        network.mlflow_token({"MLFLOW_TRACKING_TOKEN": value})
    assert "cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_neither_client_follows_a_redirect_with_credentials(server: Recording) -> None:
    with recording("127.0.0.2") as elsewhere:
        server.answer = lambda _: Answer(302, {"Location": f"{elsewhere.address}/x"})
        with MlflowServer(server.address.replace("//", "//ann:word@")) as mine, pytest.raises(TrackingError):
            mine.names()
        with pytest.raises(TrackingError, match="answers 302"), stream(f"{server.address}/x", mine.headers, 0):
            pass
    assert elsewhere.asked == []


@pytest.mark.parametrize(
    ("method", "here", "there", "followed"),
    [
        ("GET", "https://a.example.com/x", "https://b.example.com/y", True),
        ("GET", "http://a.example.com/x", "https://a.example.com/x", True),
        ("GET", "https://a.example.com/x", "http://a.example.com/x", False),
        ("GET", "https://a.example.com/x", "file:///etc/passwd", False),
        ("GET", "https://a.example.com/x", "https:///y", False),
        ("HEAD", "https://a.example.com/x", "https://b.example.com/y", True),
        ("PUT", "https://a.example.com/x", "https://a.example.com/y", True),
        ("PUT", "https://a.example.com/x", "https://b.example.com/y", False),
        ("POST", "https://a.example.com/x", "https://a.example.com:8443/y", False),
    ],
)
def test_which_redirects_are_followed(method: str, here: str, there: str, *, followed: bool) -> None:
    assert (redirect_problem(method, here, there) is None) == followed


def test_an_origin_is_scheme_host_and_port() -> None:
    assert same_origin("https://a.example.com/x", "https://A.example.com:443/y")
    assert not same_origin("https://a.example.com", "http://a.example.com")
    assert not same_origin("https://a.example.com", "https://a.example.com:444")
