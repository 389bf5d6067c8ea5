"""Bodies that mean harm: little work for each, few of a key at a time, and the wrong ones counted."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from containers.gateway import reading
from containers.gateway.errors import Refusal
from containers.gateway.intake import Intake
from containers.gateway.keys import Key, Limits
from containers.gateway.limiter import Limiter
from containers.gateway.schema import ChatRequest, CompletionRequest, forwarded
from containers.gateway.sse import StreamMeter

JSON = {b"content-type": b"application/json"}
KEYS = b",".join(b'"k%d":"a"' % number for number in range(5000))
PROMPT, CHAT = b'{"model":"m","prompt":', b'{"model":"m","messages":[{"role":"user","content":"x"'
WRONG: list[tuple[type[CompletionRequest | ChatRequest], bytes]] = [
    (CompletionRequest, PROMPT + b'"x",' + KEYS + b"}"),
    (CompletionRequest, PROMPT + b'["a",' + b"1," * 5000 + b"1]}"),
    (CompletionRequest, PROMPT + b"[1," + b"-1," * 5000 + b"1]}"),
    (CompletionRequest, PROMPT + b"[[1]," + b"[]," * 5000 + b"[]]}"),
    (CompletionRequest, PROMPT + b'"x","stop":[' + b"1," * 5000 + b"1]}"),
    (CompletionRequest, PROMPT + b'"x","stop_token_ids":[' + b"-1," * 5000 + b"1]}"),
    (CompletionRequest, PROMPT + b'"x","logit_bias":{' + KEYS + b"}}"),
    (CompletionRequest, PROMPT + b'{"a":' + b"1}}"),
    (ChatRequest, b'{"model":"m","messages":[' + b"{}," * 5000 + b"{}]}"),
    (ChatRequest, b'{"model":"m","messages":[{' + KEYS + b"}]}"),
    (ChatRequest, b'{"model":"m","messages":[{"role":"user","content":[' + b"{}," * 5000 + b"{}]}]}"),
    (ChatRequest, CHAT + b',"tool_calls":[' + b"{}," * 100 + b"{}]}]}"),
    (ChatRequest, CHAT + b'}],"tools":[' + b"{}," * 100 + b"{}]}"),
    (ChatRequest, CHAT + b'}],"tools":[{"type":"function","function":{"name":"f","parameters":{"a":['
     + b"1," * 20_000 + b"1]}}}]}"),
    (ChatRequest, CHAT + b'}],"response_format":{"type":"json_schema","json_schema":{' + KEYS * 2 + b',"a":['
     + b"1," * 20_000 + b"1]}}}"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "body"), WRONG, ids=lambda value: str(value)[:60])
def test_checking_stops_at_the_first_error(kind: type[CompletionRequest | ChatRequest], body: bytes) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(body)
    assert caught.value.error_count() < 10
    with pytest.raises(Refusal) as refused:
        reading.parsed(kind, body, JSON)
    assert refused.value.status == 400
    assert len(refused.value.message) < 1000


@pytest.mark.parametrize("body", [b"[" * 500_000, PROMPT + b"[" + b"[]," * 300_000 + b"[1]]}", b'{"a":' * 100_000,
                                  b"{" + KEYS * 9 + b"}"])  # fmt: skip
def test_structure_without_end_is_refused_before_they_are_parsed(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(CompletionRequest, "model_validate_json", never)
    with pytest.raises(Refusal, match="more than 40000 keys, lists and objects"):
        reading.parsed(CompletionRequest, body, JSON)


@pytest.mark.parametrize("text", ["[{" * 30_000, '"[\\' * 30_000, "\\u005b" * 20_000])
def test_brackets_in_a_text_are_text(text: str) -> None:
    body = CompletionRequest(model="m", prompt=text).model_dump_json(exclude_unset=True).encode()
    assert reading.parsed(CompletionRequest, body, JSON).model_dump()["prompt"] == text


@pytest.mark.parametrize("prompt", ["x", ["x", "y"], [1, 2.0], [[1], [2, 3]]])
def test_every_form_of_a_prompt_is_taken(prompt: Any) -> None:  # noqa: ANN401 - any of the forms
    assert CompletionRequest(model="m", prompt=prompt).given == prompt


# As vLLM 0.32 answers, and as its clients put it into the conversation.
CALL = {
    "role": "assistant", "content": None, "refusal": None, "annotations": None, "audio": None, "function_call": None,
    "reasoning": "The user asks for the time.",
    "tool_calls": [{"id": "call-1", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
}  # fmt: skip
CONVERSATION = {
    "model": "m",
    "messages": [{"role": "user", "content": "What time is it?"}, CALL,
                 {"role": "tool", "tool_call_id": "call-1", "content": "12:00"}],
    "tools": [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": "auto", "parallel_tool_calls": False, "reasoning_effort": "low",
}  # fmt: skip


def test_a_conversation_with_calls_of_tools_and_reasoning_reaches_the_engine_and_the_count_as_it_was_sent() -> None:
    request = ChatRequest.model_validate_json(json.dumps(CONVERSATION))
    assert forwarded(request, {}) == CONVERSATION
    assert request.plain_tools() == CONVERSATION["tools"]
    asked, call, answer = request.plain_messages()
    assert (asked["content"], answer["content"], answer["tool_call_id"]) == ("What time is it?", "12:00", "call-1")
    assert (call["content"], call["tool_calls"]) == ("", CALL["tool_calls"])
    assert call["reasoning"] == call["reasoning_content"] == CALL["reasoning"]


@pytest.mark.parametrize(
    "names", [{"reasoning_content": "x"}, {"reasoning": "x"}, {"reasoning": "x", "reasoning_content": "y"}]
)
def test_the_template_has_reasoning_under_both_names(names: dict[str, str]) -> None:
    message = {"role": "assistant", "content": "a", **names}
    request = ChatRequest.model_validate_json(json.dumps({"model": "m", "messages": [message]}))
    assert forwarded(request, {})["messages"] == [message]
    assert request.plain_messages() == [{**message, "reasoning": "x", "reasoning_content": "x"}]


@pytest.mark.parametrize("delta", [{"reasoning": "The"}, {"tool_calls": [{"index": 0, "function": {"name": "now"}}]}])
def test_calls_of_tools_and_reasoning_are_streamed_as_the_engine_sends_them(delta: dict[str, Any]) -> None:
    event = b"data: " + json.dumps({"model": "m", "choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"
    meter = StreamMeter("m")
    assert meter.feed(event) == event
    renamed = StreamMeter("adapter").feed(event)
    assert json.loads(renamed.removeprefix(b"data: ")) == {**json.loads(event[6:]), "model": "adapter"}
    assert meter.completion_tokens == 1


def key(number: int = 0) -> Key:
    """A key without limits."""
    name = f"{number:012x}"
    return Key(id=name, sha256=hashlib.sha256(b"").hexdigest(), owner="o", created=datetime.now(UTC), limits=Limits())


def test_wrong_requests_are_counted_by_key() -> None:
    async def story() -> None:
        limiter = Limiter.in_memory(lease_s=1, rejected=3)
        for _ in range(3):
            await limiter.refuse_early(key(1))
            await limiter.count_rejected(key(1))
        with pytest.raises(Refusal) as caught:
            await limiter.refuse_early(key(1))
        assert (caught.value.status, caught.value.code) == (429, "too_many_rejected")
        await limiter.refuse_early(key(2))
        await limiter.close()

    asyncio.run(story())


def test_a_key_has_so_many_bodies_at_a_time_and_another_does_not_wait() -> None:
    async def story() -> None:
        intake, held, most = Intake(each=3, wait_s=5.0), 0, 0

        async def send() -> None:
            nonlocal held, most
            async with intake.place(key(1), None):
                held += 1
                most = max(most, held)
                await asyncio.sleep(0.01)
                held -= 1

        sending = [asyncio.ensure_future(send()) for _ in range(10)]
        await asyncio.sleep(0)
        async with asyncio.timeout(1), intake.place(key(2), None):
            assert held == 3
        await asyncio.gather(*sending)
        assert most == 3

    asyncio.run(story())


def test_who_waits_too_long_for_a_place_is_refused() -> None:
    async def story() -> None:
        intake = Intake(each=1, wait_s=0.01)
        async with intake.place(key(1), None):
            with pytest.raises(Refusal) as caught:
                async with intake.place(key(1), None):
                    pass
            async with intake.place(key(1), 1000):  # a small one does not wait
                pass
        assert caught.value.code == "too_many_bodies"
        async with intake.place(key(1), 1 << 20):  # and the place is given back
            pass

    asyncio.run(story())


def test_large_bodies_take_one_sixth_of_the_time_and_small_ones_do_not_wait() -> None:
    async def story() -> tuple[list[str], list[tuple[float, float]]]:
        intake, order, times = Intake(each=16, wait_s=1.0), list[str](), list[tuple[float, float]]()

        async def parse(size: int, name: str) -> None:
            async with intake.turn(size):
                started = time.monotonic()
                time.sleep(0.002)
                order.append(name)
                times.append((started, time.monotonic()))

        large = [asyncio.ensure_future(parse(1 << 20, "large")) for _ in range(4)]
        small = [asyncio.ensure_future(parse(10, "small")) for _ in range(4)]
        await asyncio.gather(*large, *small)
        return order, [taken for name, taken in zip(order, times, strict=True) if name == "large"]

    order, large = asyncio.run(story())
    assert order[-3:] == ["large"] * 3
    for (started, ended), (following, _) in itertools.pairwise(large):
        assert following - ended >= 5 * (ended - started)
