"""What the gateway refuses before and while it asks an engine: heads, bodies, keys, prompts and engine answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from redis.exceptions import ConnectionError as RedisAwayError
from starlette.requests import ClientDisconnect
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from uvicorn.server import ServerState

from containers.gateway import keys, limiter, reading
from containers.gateway.config import Backend, GatewaySettings, ModelRoute, ReplicaRoute, Routes, Watched
from containers.gateway.errors import ConfigurationError, Refusal
from containers.gateway.gateway import Gateway, _secret
from containers.gateway.keys import Key, Keyring
from containers.gateway.metrics import Metrics
from containers.gateway.protocol import bounded
from containers.gateway.router import Pool
from containers.gateway.schema import ChatRequest, CompletionRequest
from containers.gateway.server import _listening
from containers.gateway.sse import StreamError, StreamMeter
from containers.gateway.tokens import PromptCounter
from containers.gateway.upstream import Call, Opened, Upstream

NOW = datetime(2026, 11, 29, tzinfo=UTC)
JSON = {b"content-type": b"application/json"}


def refused(doing: Coroutine[Any, Any, object]) -> tuple[int, str]:
    with pytest.raises(Refusal) as caught:
        asyncio.run(doing)
    return caught.value.status, caught.value.code


def counter(folder: Path, template: str | None = None) -> PromptCounter:
    """A tokenizer of two words, with a chat template or none."""
    made = Tokenizer(WordLevel({"a": 0, "bb": 1}, unk_token="a"))  # noqa: S106 - a word
    made.pre_tokenizer = Whitespace()
    made.save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return PromptCounter(folder)


def pool(folder: Path) -> Pool:
    route = ModelRoute(served_as="m", tokenizer=folder, context=10, default_tokens=4, backends=())
    return Pool(route, counter(folder))


def body(
    messages: Sequence[dict[str, Any]], head: dict[bytes, bytes], timeout_s: float = 5
) -> Coroutine[Any, Any, bytes]:
    """Read a body of at most three bytes that comes in these messages, and nothing after them."""
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.sleep(60)
        return left.pop(0)

    return reading.body(receive, head, 3, timeout_s)


def test_a_header_that_decides_something_is_there_once() -> None:
    with pytest.raises(Refusal, match="`authorization` was sent twice"):
        reading.headers({"headers": [(b"authorization", b"a"), (b"authorization", b"b")]})
    assert reading.headers({"headers": [(b"x-other", b"a"), (b"x-other", b"b")]}) == {b"x-other": b"b"}


def test_a_body_is_bounded_in_size_and_time_and_comes_as_it_is() -> None:
    piece = {"type": "http.request", "body": b"ab", "more_body": True}
    assert refused(body([], {b"content-length": b"4"})) == (413, "body_too_large")
    assert refused(body([piece, piece], {})) == (413, "body_too_large")
    assert refused(body([], {b"content-encoding": b"gzip"})) == (415, "unsupported_encoding")
    assert refused(body([piece], {}, 0.01)) == (408, "body_too_slow")
    with pytest.raises(ClientDisconnect):
        asyncio.run(body([piece, {"type": "http.disconnect"}], {}))


def test_what_is_no_json_is_refused() -> None:
    for data, head, code in ((b"{}", {}, "unsupported_media_type"), (b"{", JSON, "invalid_json")):
        with pytest.raises(Refusal) as caught:
            reading.parsed(CompletionRequest, data, head)
        assert caught.value.code == code


def test_prompt_and_answer_fit_into_the_context(tmp_path: Path) -> None:
    there = pool(tmp_path)
    assert reading.longest_answer(there, CompletionRequest(model="m", prompt="a", max_tokens=9), 1) == 9
    with pytest.raises(Refusal, match="context is 10 tokens; the prompt has 2 and the answer may have 9"):
        reading.longest_answer(there, CompletionRequest(model="m", prompt="a", max_tokens=9), 2)


@pytest.mark.parametrize(
    ("status", "data", "code"),
    [(401, b"{}", "replica_misconfigured"), (302, b"{}", "replica_misconfigured"), (200, b"[]", "bad_answer"),
     (200, b"<html>", "bad_answer"), (422, b"3", "bad_answer")],
)  # fmt: skip
def test_an_engines_answer_is_an_object_and_meant_for_the_client(status: int, data: bytes, code: str) -> None:
    with pytest.raises(Refusal) as caught:
        reading.check(Opened(status, data, None), StreamMeter("m"))
    assert (caught.value.status, caught.value.code) == (502, code)


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"data: {\n\n", "not JSON"), (b"data: [1]\n\n", "not an object"), (b"x" * (1 << 21), "does not end")],
)
def test_an_engines_stream_is_one_of_json_events(data: bytes, why: str) -> None:
    with pytest.raises(StreamError, match=why):
        StreamMeter("m").feed(data)


def test_a_release_without_a_template_has_no_chat_and_one_that_refuses_is_heard(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a bb"}]
    assert refused(counter(tmp_path).chat(messages, None, {}, 10)) == (400, "no_chat_template")
    plain = counter(tmp_path, "{{ messages[0].content }}")
    assert asyncio.run(plain.chat(messages, None, {}, 10)) == 2
    assert refused(counter(tmp_path, "{{ raise_exception('no') }}").chat(messages, None, {}, 10)) == (
        400, "bad_messages",
    )  # fmt: skip
    assert refused(plain.completion("a" * 21, special=False, most=10)) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({}, 1),
        ({"chat_template_kwargs": {"enable_thinking": True}}, 3),
        ({"reasoning_effort": "none"}, 2),
        ({"reasoning_effort": "low"}, 4),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}, 2),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, 4),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"thinking": False}}, 4),
    ],
)
def test_the_count_of_a_prompt_has_the_effort_of_reasoning_as_in_vllm(
    tmp_path: Path, given: dict[str, Any], tokens: int
) -> None:
    """The template gives a token for a message, one for an effort, and two for thinking."""
    template = "a {{ 'bb' if reasoning_effort is defined }} {{ 'bb bb' if enable_thinking }}"
    route = ModelRoute(served_as="m", tokenizer=tmp_path, context=10, default_tokens=4, backends=())
    request = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "a"}], **given})
    assert asyncio.run(reading.prompt_tokens(Pool(route, counter(tmp_path, template)), request)) == tokens


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="has no readable tokenizer"):
        PromptCounter(tmp_path)


def test_who_waits_for_a_replica_waits_so_long_and_in_a_queue_of_such_a_length(tmp_path: Path) -> None:
    there = pool(tmp_path)
    assert refused(there.place(1, (), 1, 0.01)) == (503, "queue_timeout")
    assert not there.waiting
    assert refused(there.place(1, (), 0, 0.01)) == (503, "queue_full")


def test_nothing_runs_uncounted_while_the_store_of_limits_is_away() -> None:
    for error in (RedisAwayError("gone"), OSError("gone")):
        with pytest.raises(Refusal) as caught, limiter._store():
            raise error
        assert (caught.value.status, caught.value.code) == (503, "limits_unavailable")


def authenticated(file: Path, header: str | None) -> Key:
    return Keyring.parse(file.read_bytes()).authenticate(header, NOW)


def test_a_key_is_that_of_the_file_while_it_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    kept, secret = keys.add(file, "ann", expires=NOW + timedelta(days=1))
    _, late = keys.add(file, "bob", expires=NOW)
    assert authenticated(file, f"Bearer {secret}").id == kept.id
    wrong = [None, "", "Bearer ", f"Basic {secret}", f"Bearer {secret[:-1]}x", "Bearer slw-0", f"Bearer {late}"]
    codes = []
    for header in wrong:
        with pytest.raises(Refusal) as caught:
            authenticated(file, header)
        assert caught.value.status == 401
        codes.append(caught.value.code)
    assert codes == ["missing_api_key"] * 4 + ["invalid_api_key"] * 2 + ["expired_api_key"]
    keys.revoke(file, kept.id)
    with pytest.raises(Refusal, match="not valid"):
        authenticated(file, f"Bearer {secret}")


def test_a_file_of_keys_is_changed_by_what_makes_sense_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with pytest.raises(ConfigurationError, match="`owner`"):
        keys.add(file, "")
    assert keys.read(file) == ()
    with pytest.raises(ConfigurationError, match="there is no key `0`"):
        keys.revoke(file, "0")
    file.write_text('{"junk": 1}')
    with pytest.raises(ConfigurationError, match="is not a list of API keys"):
        keys.add(file, "ann")
    assert file.read_text() == '{"junk": 1}'


def test_a_file_of_routes_that_is_none_is_named_by_the_key_and_without_its_values(tmp_path: Path) -> None:
    file = tmp_path / "routes.json"
    replica = {"name": "r", "url": "http://127.0.0.1:1"}
    model = {
        "served_as": "m",
        "tokenizer": "/t",
        "context": 1,
        "backends": [{"release": "r", "replicas": [replica] * 2}],
    }
    for document, where in (({"models": {"m": model}}, "two replicas have one name"), ({"secret": "word"}, "`secret`")):
        file.write_text(json.dumps(document))
        with pytest.raises(ConfigurationError, match=where) as caught:
            Watched(file, Routes.model_validate_json)
        assert "word" not in str(caught.value)


def test_a_model_that_is_unknown_and_one_that_is_not_the_keys_are_refused_alike(tmp_path: Path) -> None:
    settings = GatewaySettings(keys=tmp_path / "keys.json", routes=tmp_path / "routes.json")
    counter(tmp_path)
    backend = Backend(release="r", replicas=(ReplicaRoute(name="one", url="http://127.0.0.1:9"),))
    route = ModelRoute(served_as="m", tokenizer=tmp_path, context=10, default_tokens=4, backends=(backend,))
    settings.routes.write_text(Routes(models={"m": route}).model_dump_json())
    mine, _ = keys.add(settings.keys, "ann", models=["m"])
    other, _ = keys.add(settings.keys, "bob", models=["other"])

    async def asked() -> None:
        gateway = Gateway(settings)
        await gateway.start()
        try:
            assert gateway.pool("m", mine).route == route
            for model, key in (("other", mine), ("m", other)):
                with pytest.raises(Refusal) as caught:
                    gateway.pool(model, key)
                assert (caught.value.status, caught.value.code) == (404, "model_not_found")
        finally:
            await gateway.stop()

    asyncio.run(asked())


def test_an_engines_answer_has_a_largest_size(tmp_path: Path) -> None:
    settings = GatewaySettings(keys=tmp_path / "keys", routes=tmp_path / "routes", max_answer_bytes=3)

    async def pieces() -> AsyncIterator[bytes]:
        yield b"ab"
        yield b"cd"

    call = Call("/v1/completions", {}, {}, tokens=1, stream=False, model="m")
    asking = Upstream(settings, httpx.MockTransport(lambda _: httpx.Response(200)), Metrics())
    assert refused(asking._open(httpx.Response(200, content=pieces()), call)) == (502, "answer_too_large")


REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [(9 * REQUEST, 400, "too_many_requests_ahead"),
     (REQUEST.replace(b"x", b"x" * 17_000), 431, "head_too_large")],
)  # fmt: skip
def test_requests_that_are_too_many_or_too_large_are_refused_while_one_is_answered(
    tmp_path: Path, sent: bytes, status: int, code: str
) -> None:
    settings = GatewaySettings(keys=tmp_path / "keys", routes=tmp_path / "routes")

    async def answered() -> bytes:
        begun = asyncio.Event()

        async def never(scope: object, receive: object, send: object) -> None:
            begun.set()
            await asyncio.sleep(60)

        config = uvicorn.Config(never, http=bounded(settings), lifespan="off", log_config=None)
        config.load()
        loop = asyncio.get_running_loop()
        state = ServerState()
        async with await loop.create_server(lambda: bounded(settings)(config, state, {}), "127.0.0.1", 0) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(REQUEST)
            await asyncio.wait_for(begun.wait(), 30)
            writer.write(sent)
            answer = await asyncio.wait_for(reader.read(), 30)
            writer.close()
            for task in state.tasks:
                task.cancel()
            await asyncio.gather(*state.tasks, return_exceptions=True)
            return answer

    answer = asyncio.run(answered())
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert f'"{code}"'.encode() in answer


def test_a_port_that_is_taken_and_a_secret_that_is_not_there_are_said(tmp_path: Path) -> None:
    with _listening("127.0.0.1", 0) as first, pytest.raises(ConfigurationError, match="can't have port"):
        _listening("127.0.0.1", first.getsockname()[1])
    with pytest.raises(ConfigurationError, match="can't read"):
        _secret(tmp_path / "none")
