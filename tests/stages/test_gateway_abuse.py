"""What clients do that they should not: the right status each time, and nothing reaches the engine that should not."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import json
import secrets
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from containers.gateway import keys
from gateways import MODEL, Running, gateway, routes
from pipeline.settings import Settings
from upstreams import Upstream, upstream

BODY = {"model": MODEL, "prompt": "def", "max_tokens": 4}
MIB = 2**20


@pytest.fixture(scope="module")
def engine_server() -> Iterator[Upstream]:
    """The replica behind it."""
    with upstream() as running:
        yield running


@pytest.fixture(scope="module")
def gate(machine: Settings, tmp_path_factory: pytest.TempPathFactory, engine_server: Upstream) -> Iterator[Running]:
    """A gateway with tight bounds on whatever a client can stretch."""
    options: dict[str, Any] = {"head_timeout_s": 1.0, "body_timeout_s": 1.0, "stall_timeout_s": 1.5}
    options |= {"wrong_keys_per_minute": 100_000, "rejected_per_minute": 100_000}
    folder = tmp_path_factory.mktemp("gateway")
    with gateway(machine, folder, routes(("v1", 100, [engine_server])), **options) as running:
        yield running


@pytest.fixture
def reached(engine_server: Upstream) -> Iterator[collections.Counter[str]]:
    """Counts what reached the engine in the test, once it has ended."""
    before = len(engine_server.seen()["paths"])
    found: collections.Counter[str] = collections.Counter()
    yield found
    assert collections.Counter(engine_server.seen()["paths"][before:]) == found


def raw(gate: Running, data: bytes, *, seconds: float = 5.0) -> bytes:
    """Send bytes as they are; give everything that comes back until the connection is closed."""
    with connected(gate) as connection:
        connection.settimeout(seconds)
        parts = []
        try:
            connection.sendall(data)
            while part := connection.recv(65536):
                parts.append(part)
        except (TimeoutError, ConnectionResetError, BrokenPipeError):
            pass
    return b"".join(parts)


def connected(gate: Running) -> socket.socket:
    host, _, port = gate.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), 5)


def one_answer(connection: socket.socket) -> bytes:
    """Read until an answer's JSON is whole; the connection stays open."""
    found = b""
    while not found.endswith(b"}"):
        found += connection.recv(65536)
    return found


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


def post(gate: Running, *head: str, body: bytes = b"", path: str = "/v1/completions") -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {gate.key}",
        "Content-Type: application/json",
        *head,
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@pytest.mark.parametrize(
    "path",
    [
        "/invocations", "/pause", "/resume", "/metrics", "/update_weights", "/v1/load_lora_adapter", "/tokenize",
        "/pooling", "/v1/embeddings", "/v1/responses", "/docs", "/openapi.json", "/v1/completions/", "//v1/completions",
        "/v1/../invocations", "/v1/%2e%2e/invocations", "/v1/completions%2f..%2f..%2finvocations", "/replicas", "/seen",
        "/v1/completions;/pause", "/V1/completions", "/v1/completions%00",
    ],
)  # fmt: skip
def test_only_the_paths_on_the_list_exist(gate: Running, reached: collections.Counter[str], path: str) -> None:
    body = json.dumps(BODY).encode()
    for method in (b"POST", b"GET"):
        request = post(gate, f"Content-Length: {len(body)}", "Connection: close", body=body, path=path)
        assert statuses(raw(gate, request.replace(b"POST", method, 1)))[0] == 404


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"])
def test_a_path_takes_its_method_alone(gate: Running, reached: collections.Counter[str], method: str) -> None:
    with gate.client() as client:
        answer = client.request(method, "/v1/completions", json=BODY)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    "header",
    [
        "", "Bearer", "Basic dXNlcjpwYXNz", "Bearer nonsense", "Bearer slw-000000000000-" + "A" * 43,
        "Bearer slw-{id}-" + "A" * 43, "Bearer {key}x", "bearer  {key}x", "{key}", "Bearer {key} {key}",
    ],
)  # fmt: skip
def test_no_key_or_a_wrong_one_is_401_and_reads_no_body(
    gate: Running, reached: collections.Counter[str], header: str
) -> None:
    value = header.format(key=gate.key, id=gate.key.split("-")[1])
    with httpx.Client(base_url=gate.url, trust_env=False) as client:
        answer = client.post("/v1/completions", json=BODY, headers={"Authorization": value} if header else {})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert gate.key.split("-", 2)[2] not in answer.text


def test_expired_and_revoked_keys_are_401(gate: Running, reached: collections.Counter[str]) -> None:
    file = gate.folder / "keys.json"
    _, old = keys.add(file, "x", expires=datetime.now(UTC) - timedelta(seconds=1))
    made, gone = keys.add(file, "x")
    keys.revoke(file, made.id)
    gate.add_key()
    codes = [gate.ask(key=key).json()["error"]["code"] for key in (old, gone)]
    assert codes == ["expired_api_key", "invalid_api_key"]


def test_keys_are_kept_as_hashes_and_readable_to_their_owner_alone(gate: Running) -> None:
    file = gate.folder / "keys.json"
    assert gate.key.split("-", 2)[2] not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


def test_guessing_is_slowed_down_by_address(machine: Settings, tmp_path: Path, engine_server: Upstream) -> None:
    with gateway(machine, tmp_path, routes(("v1", 100, [engine_server])), wrong_keys_per_minute=5) as running:
        tries = [running.ask(key=f"slw-{secrets.token_hex(6)}-{'A' * 43}").status_code for _ in range(7)]
        assert tries == [401] * 5 + [429] * 2
        assert running.ask().status_code == 200, "who has a key is not held up by a neighbour"


def test_wrong_bodies_are_counted_and_then_not_read(
    machine: Settings, tmp_path: Path, engine_server: Upstream, reached: collections.Counter[str]
) -> None:
    with gateway(machine, tmp_path, routes(("v1", 100, [engine_server])), rejected_per_minute=3) as gate:
        other = gate.add_key()
        body = b'{"model": "demo-awq", "prompt": "x", ' + b",".join(b'"k%d": 0' % n for n in range(30_000)) + b"}"
        with gate.client() as client:
            headers = {"Content-Type": "application/json"}
            found = [client.post("/v1/completions", content=body, headers=headers) for _ in range(4)]
        assert [answer.status_code for answer in found] == [400, 400, 400, 429]
        assert found[0].json()["error"]["param"] == "k0"
        assert int(found[3].headers["retry-after"]) == 60
        assert statuses(raw(gate, post(gate, f"Content-Length: {MIB}"))) == [429], "answered without its body"
        assert gate.ask(key=other).status_code == 200
        reached["/v1/completions"] += 1
        assert httpx.get(f"{gate.url}/health").status_code == 200
        assert gate.metric("refused_total", code="too_many_rejected") == 2


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"{", 400), (b"[]", 400), (b"null", 400), (b"\xff\xfe", 400), (b'{"model": "demo-awq"}', 400),
        (b'{"model": "demo-awq", "prompt": "x", "max_tokens": 0}', 400),
        (b'{"model": "demo-awq", "prompt": "x", "max_tokens": "4"}', 400),
        (b'{"model": "demo-awq", "prompt": "x", "max_tokens": 1e400}', 400),
        (b'{"model": "demo-awq", "prompt": "x", "temperature": NaN}', 400),
        (b'{"model": "demo-awq", "prompt": "\\ud800"}', 400), (b'{"model": "demo-awq", "prompt": ' + b"[" * 5000, 400),
        (b'{"model": "demo-awq", "prompt": [-1]}', 400), (b'{"model": "demo-awq", "prompt": []}', 400),
        (b'{"model": "demo-awq", "prompt": "x", "prompt_embeds": "AAAA"}', 400),
        (b'{"model": "demo-awq", "prompt": "x", "logits_processors": ["os.system"]}', 400),
        (b'{"model": "demo-awq", "prompt": "x", "best_of": 100}', 400),
        (b'{"model": "demo-awq", "prompt": "x", "n": 1000}', 400), (b'{"model": "other", "prompt": "x"}', 404),
        (b'{"model": "demo-awq", "prompt": "' + b"word " * 20000 + b'"}', 400),
        (b'{"model": "demo-awq", "prompt": "x", "max_tokens": 1024}', 400),
    ],
)  # fmt: skip
def test_malformed_requests_are_said_to_be_so(
    gate: Running, reached: collections.Counter[str], body: bytes, status: int
) -> None:
    with gate.client() as client:
        answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_chat_may_bring_neither_pictures_nor_templates(gate: Running, reached: collections.Counter[str]) -> None:
    picture = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
    chat: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": [picture]}]}
    with gate.client() as client:
        assert client.post("/v1/chat/completions", json=chat).status_code == 400
        plain = [{"role": "user", "content": "x"}]
        for extra in ({"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}):
            answer = client.post("/v1/chat/completions", json={**chat, "messages": plain, **extra})
            assert "unknown key" in answer.json()["error"]["message"]


def test_what_a_client_sent_is_not_in_the_message_it_gets(gate: Running) -> None:
    with gate.client() as client:
        answer = client.post("/v1/completions", json={**BODY, "max_tokens": "hush-hush"})
    assert "hush-hush" not in answer.text


def test_oversized_bodies_are_413_by_their_length_and_by_their_bytes(
    gate: Running, reached: collections.Counter[str]
) -> None:
    declared = raw(gate, post(gate, f"Content-Length: {10 * MIB}", body=b"{"))
    assert statuses(declared) == [413]
    chunk = b"%x\r\n%s\r\n" % (MIB, b"x" * MIB)
    assert statuses(raw(gate, post(gate, "Transfer-Encoding: chunked", body=chunk + chunk))) in ([413], [])
    with gate.client() as client:
        assert client.post("/v1/completions", content=b"{}", headers={"Content-Encoding": "gzip"}).status_code == 415
        assert client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415


def test_heads_without_end_are_431_and_slow_ones_408(gate: Running, reached: collections.Counter[str]) -> None:
    assert statuses(raw(gate, post(gate, "X-Long: " + "a" * 40_000))) == [431]
    assert statuses(raw(gate, post(gate, *(f"X-{index}: {'a' * 100}" for index in range(400))))) == [431]
    assert statuses(raw(gate, b"GET /" + b"a" * 400_000)) in ([431], [])
    assert statuses(raw(gate, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow:")) == [408]
    assert statuses(raw(gate, post(gate, "Content-Length: 100", body=b"{"))) == [408]


def test_a_long_body_in_pieces_is_no_long_head(gate: Running, reached: collections.Counter[str]) -> None:
    body = json.dumps({**BODY, "prompt": "a " * 200_000}).encode()
    host, _, port = gate.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), 5) as connection:
        for piece in (post(gate, f"Content-Length: {len(body)}"), body[:9], body[9:70_000], body[70_000:]):
            connection.sendall(piece)
            time.sleep(0.05)
        assert statuses(connection.recv(65536)) == [400]


SMUGGLED = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (["Content-Length: 4", "Transfer-Encoding: chunked"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding: chunked", "Content-Length: 4"], b"0\r\n\r\n" + SMUGGLED),
        (["Content-Length: 4", "Content-Length: 40"], b"{}  " + SMUGGLED),
        (["Content-Length: 4, 40"], b"{}  " + SMUGGLED),
        (["Content-Length: +4"], b"{}  " + SMUGGLED),
        (["Content-Length: -1"], b"{}  " + SMUGGLED),
        (["Content-Length: 4x"], b"{}  " + SMUGGLED),
        (["Content-Length : 4"], b"{}  " + SMUGGLED),
        (["Transfer-Encoding: identity, chunked, identity"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding: xchunked"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding : chunked"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding:\x0bchunked"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding: chunked"], b"0;a=\nb\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding: chunked"], b"fffffffffffffffff\r\n" + SMUGGLED),
        (["Transfer-Encoding: chunked"], b"-1\r\n" + SMUGGLED),
        (["X: 1\r\n Content-Length: 40"], SMUGGLED),
        (["X: 1\nContent-Length: 40"], SMUGGLED),
        (["X: a\x00b", "Content-Length: 2"], b"{}" + SMUGGLED),
        (["Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "Content-Length: 2"], b"{}" + SMUGGLED),
        (["Authorization: Bearer other", "Content-Length: 2"], b"{}" + SMUGGLED),
        (["Connection: Authorization, close", "X-Forwarded-Path: /invocations", "Content-Length: 2"], b"{}" + SMUGGLED),
    ],
)  # fmt: skip
def test_nothing_is_smuggled_past(
    gate: Running, reached: collections.Counter[str], head: list[str], body: bytes
) -> None:
    """Whatever two parsers might read in this, the engine sees no request of it, and the connection ends."""
    found = statuses(raw(gate, post(gate, *head, body=body), seconds=3))
    assert found
    assert set(found) <= {400, 401, 404, 408, 415, 503}


def test_two_requests_at_once_on_one_connection_are_two_requests(
    gate: Running, reached: collections.Counter[str]
) -> None:
    body = json.dumps(BODY).encode()
    one = post(gate, f"Content-Length: {len(body)}", body=body)
    last = post(gate, f"Content-Length: {len(body)}", "Connection: close", body=body)
    assert statuses(raw(gate, one + one + last)) == [200, 200, 200]
    reached["/v1/completions"] += 3


@pytest.mark.parametrize("line", ["POST /v1/completions", "GET /health", "POST /nowhere"])
def test_who_is_answered_and_owes_the_rest_of_a_body_is_not_waited_for(
    gate: Running, reached: collections.Counter[str], line: str
) -> None:
    with connected(gate) as connection:
        connection.sendall(f"{line} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode())
        assert statuses(one_answer(connection))[0] in {200, 401, 404}
        connection.sendall(b"x")
        assert connection.recv(65536) == b"", "it is closed, and nothing more is said"


def test_the_rest_of_a_body_that_was_answered_may_still_come(gate: Running, reached: collections.Counter[str]) -> None:
    with connected(gate) as connection:
        for _ in range(2):
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
            assert statuses(one_answer(connection)) == [401]
            connection.sendall(b"123456789")
        assert connection.recv(65536) == b"", "and who asks nothing more is closed too"


def test_requests_ahead_of_their_answers_are_bounded(gate: Running, reached: collections.Counter[str]) -> None:
    found = statuses(raw(gate, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 5000))
    assert len(found) < 50
    assert set(found) <= {200, 400}


def test_who_leaves_with_requests_ahead_stops_the_engine(
    gate: Running, reached: collections.Counter[str], engine_server: Upstream
) -> None:
    engine_server.behave(token_ms=40)
    before = engine_server.seen()["cancelled"]
    body = json.dumps({**BODY, "max_tokens": 1000}).encode()
    try:
        with connected(gate) as connection:
            connection.sendall(2 * post(gate, f"Content-Length: {len(body)}", body=body))
            while not engine_server.seen()["running"]:
                time.sleep(0.02)
        deadline = time.monotonic() + 5
        while engine_server.seen()["cancelled"] == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        engine_server.behave(token_ms=1)
    reached["/v1/completions"] += 1


def test_half_a_head_does_not_break_into_an_answer(
    gate: Running, reached: collections.Counter[str], engine_server: Upstream
) -> None:
    """The answer takes longer than a head may."""
    engine_server.behave(token_ms=40)
    body = json.dumps({**BODY, "max_tokens": 40, "stream": True}).encode()
    try:
        answer = raw(gate, post(gate, f"Content-Length: {len(body)}", body=body) + b"GET /hea")
    finally:
        engine_server.behave(token_ms=1)
    reached["/v1/completions"] += 1
    assert statuses(answer) == [200, 408]
    assert b"data: [DONE]" in answer.split(b"HTTP/1.1 408")[0]


def test_trailers_are_bounded_and_no_headers(gate: Running, reached: collections.Counter[str]) -> None:
    head = ("Transfer-Encoding: chunked",)
    for trailer in (b"X-More: aaaaaaaaaa\r\n" * 50_000, b"X-Long: " + b"a" * MIB, b"X: " + b"a" * 100 + b"\r\n"):
        assert statuses(raw(gate, post(gate, *head, body=b"2\r\n{}\r\n0\r\n" + trailer))) in ([431], [408], [])
    assert statuses(raw(gate, post(gate, *head, body=b"2;" + b"a" * MIB))) in ([431], [])
    key = f"Authorization: Bearer {gate.key}\r\n".encode()
    hidden = post(gate, *head, "Connection: close", body=b"2\r\n{}\r\n0\r\n" + key + b"\r\n").replace(key, b"", 1)
    assert key in hidden
    assert statuses(raw(gate, hidden)) == [401]


def test_who_reads_no_answers_is_dropped(gate: Running) -> None:
    """Small answers to many requests; no application waits with a time-out of its own."""
    host, _, port = gate.process.admin_url.removeprefix("http://").partition(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))

        def go_on() -> None:
            for _ in range(200):
                connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
                time.sleep(0.1)

        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            go_on()


def test_absolute_targets_and_connect_lead_nowhere(gate: Running, reached: collections.Counter[str]) -> None:
    for line in (b"GET http://169.254.169.254/latest HTTP/1.1", b"CONNECT 127.0.0.1:22 HTTP/1.1", b"GET * HTTP/1.1"):
        assert statuses(raw(gate, line + b"\r\nHost: x\r\nConnection: close\r\n\r\n")) in ([400], [404], [405])


def memory_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


@pytest.mark.timed
def test_slow_readers_hold_neither_memory_nor_a_replica(machine: Settings, tmp_path: Path) -> None:
    """60 clients ask for long streams and read nothing: they are dropped, and the engine is told to stop."""
    with upstream(token_ms=0) as server:
        routed = routes(("v1", 100, [server]), context=100_000)
        with gateway(machine, tmp_path, routed, stall_timeout_s=1.5) as running:
            pid = running.process.process.pid
            before = memory_of(pid)
            body = json.dumps({**BODY, "max_tokens": 20_000, "stream": True}).encode()
            with contextlib.ExitStack() as held:
                for _ in range(60):
                    request = post(running, f"Content-Length: {len(body)}", body=body)
                    held.enter_context(hold(running, request))
                most = before
                deadline = time.monotonic() + 60
                while running.metric("hung_up_total") < 60 and time.monotonic() < deadline:
                    most = max(most, memory_of(pid))
                    time.sleep(0.2)
                assert running.metric("hung_up_total") == 60
                assert server.seen()["running"] == 0
                assert most - before < 100 * MIB
                assert running.ask().status_code == 200


def hold(gate: Running, data: bytes) -> socket.socket:
    """Send a request and read nothing of its answer."""
    host, _, port = gate.url.removeprefix("http://").partition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    connection.sendall(data)
    return connection


@pytest.mark.timed
def test_a_thousand_clients_at_once_are_all_answered(machine: Settings, tmp_path: Path) -> None:
    """No failure but what the queue's bound says; every place is given back; memory stays bounded."""
    with upstream(token_ms=2) as first, upstream(token_ms=2) as second:
        routed = routes(("v1", 100, [first, second]), parallel=64)
        with gateway(machine, tmp_path, routed, queue_size=1000, queue_timeout_s=60.0) as running:
            pid = running.process.process.pid
            before = memory_of(pid)
            answers, most = asyncio.run(storm(running, 1000, pid))
            assert collections.Counter(answers) == {"200": 1000}
            assert most - before < 200 * MIB
            state = running.process.state()
            assert state.queues == {MODEL: 0}
            assert {(each.running, each.tokens) for each in state.replicas} == {(0, 0)}
            assert max(first.seen()["most"], second.seen()["most"]) <= 64


async def storm(gate: Running, clients: int, pid: int) -> tuple[list[str], int]:
    most = 0

    async def measure() -> None:
        nonlocal most
        while True:
            most = max(most, memory_of(pid))
            await asyncio.sleep(0.1)

    async def one(number: int) -> str:
        head = {"Authorization": f"Bearer {gate.key}"}
        async with httpx.AsyncClient(timeout=90, trust_env=False, headers=head) as client:
            body = {**BODY, "max_tokens": 20, "stream": number % 2 == 0}
            try:
                answer = await client.post(f"{gate.url}/v1/completions", json=body)
            except httpx.HTTPError as error:
                return type(error).__name__
            if body["stream"] and not answer.text.endswith("data: [DONE]\n\n"):
                return "cut off"
            return str(answer.status_code)

    watching = asyncio.ensure_future(measure())
    answers = await asyncio.gather(*(one(number) for number in range(clients)))
    watching.cancel()
    return answers, most


def test_more_connections_than_the_bound_are_turned_away(
    machine: Settings, tmp_path: Path, engine_server: Upstream
) -> None:
    with gateway(machine, tmp_path, routes(("v1", 100, [engine_server])), max_connections=20) as running:
        host, _, port = running.url.removeprefix("http://").partition(":")
        held = [socket.create_connection((host, int(port))) for _ in range(20)]
        time.sleep(0.3)
        assert statuses(raw(running, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")) == [503]
        for connection in held:
            connection.close()
        for _ in itertools.repeat(None, 50):
            if statuses(raw(running, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")) == [200]:
                return
            time.sleep(0.1)
        pytest.fail("the places were not given back")
