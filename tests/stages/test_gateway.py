"""The gateway as a process before scripted replicas: what it passes on, where it sends it, and how it fails."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from containers.gateway import keys
from containers.gateway.config import Routes
from gateways import MODEL, TOKENIZER, Running, gateway, routes
from pipeline.settings import Settings
from upstreams import Upstream, upstream

Start = Callable[..., Running]
STREAM = {"model": MODEL, "prompt": "def", "max_tokens": 50, "stream": True}


@pytest.fixture
def start(machine: Settings, tmp_path: Path) -> Iterator[Start]:
    """Start a gateway; it ends with the test."""
    with ExitStack() as stack:
        yield lambda *words, **options: stack.enter_context(gateway(machine, tmp_path / "gw", *words, **options))


@pytest.fixture
def two() -> Iterator[list[Upstream]]:
    """Two replicas."""
    with upstream() as first, upstream() as second:
        yield [first, second]


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)


def test_an_answer_passes_through_and_the_engine_sees_only_what_it_should(start: Start, two: list[Upstream]) -> None:
    gate = start(routes(("v1", 100, two[:1])))
    with gate.client() as client:
        head = {
            "X-Request-Id": "mine-7",
            "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",
            "tracestate": "x=1",
            "Cookie": "c=1",
        }
        body = {"model": MODEL, "prompt": "def f", "max_tokens": 4, "temperature": 0.5}
        answer = client.post("/v1/completions", json=body, headers=head)
        client.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 4)
    assert answer.json()["model"] == MODEL, "the client's name, not the engine's"
    assert answer.headers["x-request-id"] == "mine-7"
    assert answer.headers["traceparent"].split("-")[1] == "a" * 32
    assert answer.headers["x-slipway-release"] == "v1"
    assert not {"set-cookie", "server", "date"} & set(answer.headers)
    seen = two[0].seen()
    assert seen["bodies"][0] == {"model": "demo", "prompt": "def f", "max_tokens": 4, "temperature": 0.5}
    assert seen["headers"][0]["x-request-id"] == "mine-7"
    assert seen["headers"][0]["traceparent"].split("-")[1:3] != ["a" * 32, "b" * 16], "a span of its own"
    assert seen["headers"][0]["tracestate"] == "x=1"
    for headers in seen["headers"]:
        assert not {"authorization", "cookie"} & set(headers)
    log = gate.process.log.read_text()
    assert '"request": "mine-7"' in log
    assert "def f" not in log
    assert gate.key not in log


def test_a_stream_comes_as_it_is_made_and_its_usage_is_hidden_unless_asked_for(
    start: Start, two: list[Upstream]
) -> None:
    two[0].behave(token_ms=40)
    gate = start(routes(("v1", 100, two[:1])))
    times, events = [], []
    with gate.client() as client, client.stream("POST", "/v1/completions", json={**STREAM, "max_tokens": 10}) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        for line in answer.iter_lines():
            if line:
                times.append(time.monotonic())
                events.append(line)
    assert events[-1] == "data: [DONE]"
    assert len(events) == 11
    assert {json.loads(event.removeprefix("data: "))["model"] for event in events[:-1]} == {MODEL}
    assert times[-2] - times[0] > 0.3, "nothing was held back until the end"
    body = {**STREAM, "stream_options": {"include_usage": True}}
    with gate.client() as client:
        assert '"completion_tokens":50' in client.post("/v1/completions", json=body).text
    wait_until(lambda: gate.metric("tokens_total", kind="completion") == 60)
    assert gate.metric("first_token_seconds_count") == 2


def test_a_client_that_hangs_up_stops_the_engine_and_is_charged_for_what_it_got(
    start: Start, two: list[Upstream]
) -> None:
    two[0].behave(token_ms=30)
    gate = start(routes(("v1", 100, two[:1])))
    key = gate.add_key(tokens_per_minute=500)
    for cancelled, stream in ((1, True), (2, False)):
        with gate.client(key) as client:
            body = {**STREAM, "max_tokens": 100, "stream": stream}
            if stream:
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=body, timeout=0.3)
        wait_until(lambda: two[0].seen()["cancelled"] == cancelled)  # noqa: B023 - it ends within this turn
    wait_until(lambda: gate.metric("hung_up_total") == 2)
    # The stream is charged for what it got; the other for all it had reserved, since nobody knows what it cost.
    assert 101 <= gate.metric("tokens_total", kind="completion") + 101 <= 130
    assert gate.ask(key=key, max_tokens=300).status_code == 200
    assert gate.ask(key=key, max_tokens=300).status_code == 429


def test_requests_go_where_the_fewest_tokens_are_outstanding(start: Start, two: list[Upstream]) -> None:
    gate = start(routes(("v1", 100, two)))
    for each in two:
        each.behave(token_ms=10)
    with ThreadPoolExecutor(8) as pool:
        long = pool.submit(gate.ask, max_tokens=300, stream=True)
        time.sleep(0.3)
        short = [pool.submit(gate.ask, max_tokens=20) for _ in range(6)]
        assert {each.result().status_code for each in [long, *short]} == {200}
    counts = sorted(len(each.seen()["paths"]) for each in two)
    assert counts == [1, 6], "the one with the long answer got nothing else"


def test_a_canary_gets_its_share_exactly(start: Start, two: list[Upstream]) -> None:
    gate = start(routes(("champion", 90, two[:1]), ("canary", 10, two[1:])))
    wait_until(lambda: all(each.state == "ready" for each in gate.process.state().replicas))
    releases = collections.Counter(gate.ask().headers["x-slipway-release"] for _ in range(50))
    assert releases == {"champion": 45, "canary": 5}
    two[1].process.kill()
    assert {gate.ask().status_code for _ in range(30)} == {200}, "its share goes to the other where it is away"


@pytest.mark.parametrize("how", ["refuses", "breaks", "errs"])
def test_a_replica_that_fails_before_the_first_byte_costs_nobody_anything(
    start: Start, two: list[Upstream], how: str
) -> None:
    # No health check finds out before a request does.
    gate = start(routes(("v1", 100, two)), health_interval_s=60.0)
    wait_until(lambda: all(each.state == "ready" for each in gate.process.state().replicas))
    if how == "refuses":
        two[0].process.kill()
    elif how == "breaks":
        two[0].behave(token_ms=20, die_after=10_000)
    else:
        two[0].behave(status=503)
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(gate.ask, max_tokens=10, stream=how != "breaks" and bool(index % 2)) for index in range(40)
        ]
        assert collections.Counter(each.result().status_code for each in asked) == {200: 40}
    assert gate.metric("retries_total") >= 1


def test_a_request_that_kills_replicas_is_delivered_twice_at_most(start: Start) -> None:
    with ExitStack() as stack:
        many = [stack.enter_context(upstream(die_after=1)) for _ in range(4)]
        gate = start(routes(("v1", 100, many)))
        wait_until(lambda: all(each.state == "ready" for each in gate.process.state().replicas))
        answer = gate.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "replica_failed")
        time.sleep(0.2)
        assert sum(each.process.poll() is None for each in many) == 2


def test_connections_that_are_never_made_are_no_deliveries(start: Start, two: list[Upstream]) -> None:
    """Two replicas whose hosts answer no more: what asks them is answered by the third."""
    with stuck() as first, stuck() as second:
        silent = [Upstream(url, two[0].process) for url in (first, second)]
        options = {"connect_timeout_s": 0.2, "health_interval_s": 60.0}
        gate = start(routes(("v1", 100, silent), ("v2", 0, two[:1])), **options)
        wait_until(lambda: all(each.state == "ready" for each in gate.process.state().replicas))
        for url in (first, second):
            httpx.get(f"{url}/stop")
        assert gate.ask().headers["x-slipway-release"] == "v2"


@contextlib.contextmanager
def stuck() -> Iterator[str]:
    """A server that is well until it is asked to stop; then its queue of connections is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))

        def answer() -> None:
            asked = b""
            while not asked.startswith(b"GET /stop"):
                connection, _ = listener.accept()
                with connection:
                    asked = connection.recv(65536)
                    if asked.startswith(b"GET /stop"):
                        for _ in range(4):
                            filler = stack.enter_context(socket.socket())
                            filler.setblocking(False)
                            filler.connect_ex(listener.getsockname())
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_stream_that_breaks_ends_in_an_error_that_clients_read(start: Start, two: list[Upstream]) -> None:
    two[0].behave(die_after=5)
    gate = start(routes(("v1", 100, two[:1])))
    with gate.client() as client:
        answer = client.post("/v1/completions", json=STREAM)
    events = [line for line in answer.text.splitlines() if line]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "stream_broken"
    assert "data: [DONE]" not in events
    assert gate.metric("broken_streams_total") == 1


def test_a_replica_is_ejected_while_it_is_sick_and_returns_by_itself(start: Start, two: list[Upstream]) -> None:
    gate = start(routes(("v1", 100, two)))
    two[0].behave(sick=True)
    wait_until(lambda: "ejected" in {each.state for each in gate.process.state().replicas})
    before = len(two[0].seen()["paths"])
    assert {gate.ask().status_code for _ in range(10)} == {200}
    assert len(two[0].seen()["paths"]) == before
    two[0].behave(sick=False)
    wait_until(lambda: {each.state for each in gate.process.state().replicas} == {"ready"})
    for _ in range(4):
        gate.ask()
    assert len(two[0].seen()["paths"]) > before


def test_a_replica_that_freezes_loses_its_requests_to_another(start: Start, two: list[Upstream]) -> None:
    """A host that vanishes closes no connection: health checks tell, and who waits for it is answered elsewhere."""
    gate = start(routes(("v1", 100, two)), health_timeout_s=0.3)
    wait_until(lambda: all(each.state == "ready" for each in gate.process.state().replicas))
    for each in two:
        each.behave(token_ms=20)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(gate.ask, max_tokens=20) for _ in range(4)]
        time.sleep(0.1)
        os.kill(two[0].process.pid, signal.SIGSTOP)
        assert {each.result().status_code for each in asked} == {200}
    os.kill(two[0].process.pid, signal.SIGCONT)


def test_the_queue_is_bounded_in_length_and_time(start: Start, two: list[Upstream]) -> None:
    two[0].behave(token_ms=100)
    gate = start(routes(("v1", 100, two[:1]), parallel=1), queue_size=2, queue_timeout_s=1.0)
    with ThreadPoolExecutor(8) as pool:
        asked = []
        for _ in range(6):
            asked.append(pool.submit(gate.ask, max_tokens=15))
            time.sleep(0.05)
        assert gate.metric("queue_length") == 2
        answers = [each.result() for each in asked]
    codes = collections.Counter(
        answer.json()["error"]["code"] if answer.status_code == 503 else "ok" for answer in answers
    )
    assert codes == {"ok": 1, "queue_full": 3, "queue_timeout": 2}
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)
    assert two[0].seen()["most"] == 1


def test_keys_and_routes_change_without_a_restart_and_a_broken_file_changes_nothing(
    start: Start, two: list[Upstream]
) -> None:
    gate = start(routes(("v1", 100, two[:1])))
    file = gate.folder / "keys.json"
    made, text = keys.add(file, "someone", models=["other"])
    gate.wait_for_key(text)
    assert gate.ask(key=text).status_code == 404
    keys.revoke(file, made.id)
    gate.wait_for_key(text, 401)
    _, old = keys.add(file, "someone", expires=datetime.now(UTC) - timedelta(seconds=1))
    gate.add_key()
    assert gate.ask(key=old).json()["error"]["code"] == "expired_api_key"
    good = file.read_text()
    file.write_text("[{}]")
    wait_until(lambda: gate.metric("stale_files", file="keys") == 1)
    assert gate.ask().status_code == 200
    file.write_text(good)
    broken = gate.folder / "no-words"
    broken.mkdir()
    model = {"type": "WordLevel", "vocab": {}, "unk_token": "?"}
    (broken / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    changed = routes(("v2", 100, two[1:])).models[MODEL].model_copy(update={"tokenizer": broken})
    gate.process.settings.routes.write_text(Routes(models={MODEL: changed}).model_dump_json())
    wait_until(lambda: gate.metric("stale_files", file="routes") == 1)
    gate.process.route(routes(("v2", 100, two[1:])))
    gate.process.wait_ready()
    assert gate.ask().headers["x-slipway-release"] == "v2"


def test_a_replica_that_leaves_finishes_what_it_began(start: Start, two: list[Upstream]) -> None:
    two[0].behave(token_ms=20)
    gate = start(routes(("v1", 100, two[:1])))
    with ThreadPoolExecutor(2) as pool:
        begun = pool.submit(gate.ask, max_tokens=50, stream=True)
        time.sleep(0.2)
        gate.process.route(routes(("v2", 100, two[1:])))
        name = f"v1-{two[0].url.rpartition(':')[2]}"
        assert {each.name: each.state for each in gate.process.state().replicas}[name] == "draining"
        assert gate.ask().headers["x-slipway-release"] == "v2"
        assert gate.process.wait_idle({name}, 5)
        assert begun.result().text.endswith("data: [DONE]\n\n")
    wait_until(lambda: name not in {each.name for each in gate.process.state().replicas})


def is_refused(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.ConnectError:
        return True
    return False


@pytest.mark.timed
def test_it_drains_on_sigterm(start: Start, two: list[Upstream]) -> None:
    two[0].behave(token_ms=20)
    gate = start(routes(("v1", 100, two[:1])), drain_delay_s=5.0)
    with ThreadPoolExecutor(2) as pool:
        begun = pool.submit(gate.ask, max_tokens=500, stream=True)
        wait_until(lambda: two[0].seen()["running"] == 1)
        gate.process.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{gate.process.admin_url}/ready").status_code == 503, 2)
        assert httpx.get(f"{gate.url}/health").status_code == 503
        assert gate.ask().status_code == 200, "who has not heard yet that it is about to stop is served"
        wait_until(lambda: is_refused(gate.url))
        assert begun.result().text.endswith("data: [DONE]\n\n")
    assert gate.process.process.wait(5) == 0


def test_who_asks_too_often_is_refused_before_tokens_are_counted(start: Start, two: list[Upstream]) -> None:
    gate = start(routes(("v1", 100, two[:1])))
    key = gate.add_key(requests_per_minute=1)
    assert gate.ask(key=key).status_code == 200
    assert gate.ask("word " * 5000).status_code == 400, "it does not fit the context, which counting tells"
    assert gate.ask("word " * 5000, key=key).status_code == 429


def test_a_chat_is_counted_as_its_template_writes_it(start: Start, two: list[Upstream], tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((TOKENIZER / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|bos|>"}')
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    routed = routes(("v1", 100, two[:1]), context=20)
    route = routed.models[MODEL].model_copy(update={"tokenizer": folder})
    gate = start(routed.model_copy(update={"models": {MODEL: route}}))
    with gate.client() as client:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
        body = {"model": MODEL, "messages": [{"role": "user", "content": parts}], "max_completion_tokens": 8}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        assert client.post("/v1/chat/completions", json={**body, "max_completion_tokens": 18}).status_code == 400
    sent = two[0].seen()["bodies"][0]
    assert (sent["max_tokens"], "max_completion_tokens" in sent) == (8, False)


def test_the_longest_answer_is_always_said_to_the_engine(start: Start, two: list[Upstream]) -> None:
    gate = start(routes(("v1", 100, two[:1]), default_tokens=7))
    with gate.client() as client:
        client.post("/v1/completions", json={"model": MODEL, "prompt": "def"})
    assert two[0].seen()["bodies"][0]["max_tokens"] == 7
