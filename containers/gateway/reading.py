"""Reading a request (headers, body with limits, JSON, token count) and the engine's answer."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import httpx
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from containers.gateway.errors import Refusal
from containers.gateway.router import Pool
from containers.gateway.schema import UNKNOWN_KEY, ChatRequest, CompletionRequest
from containers.gateway.sse import StreamMeter
from containers.gateway.upstream import Opened

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from starlette.types import Receive, Scope

# If one of these were sent twice, gateway and engine could use different values.
_ONCE = frozenset(
    {b"authorization", b"content-length", b"content-type", b"content-encoding", b"transfer-encoding", b"host"}
)
_TOLD, _LONGEST_KEY = 3, 60
# A conversation of 4,096 messages, each with a piece of text, has 24,579. (The parser itself stops at a depth of 200.)
_MOST_PARTS = 40_000
# A string, or the beginning of one that is not closed. Possessive, so that there is no backtracking.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


def headers(scope: Scope) -> Mapping[bytes, bytes]:
    """Return the request's headers; ``Refusal`` 400 if one that matters was sent twice."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in found and name in _ONCE:
            raise Refusal(400, "ambiguous_header", f"`{name.decode()}` was sent twice", close=True)
        found[name] = value
    return found


async def body(receive: Receive, head: Mapping[bytes, bytes], most: int, timeout_s: float) -> bytes:
    """Read the body: at most ``most`` bytes in at most ``timeout_s`` seconds.

    Raises:
        Refusal: 413, 415 or 408; the connection is closed, since the rest was not read.
        ClientDisconnect: The client left.
    """
    too_large = Refusal(413, "body_too_large", f"the body may have at most {most} bytes", close=True)
    if int(head.get(b"content-length", b"0")) > most:
        raise too_large
    if head.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refusal(415, "unsupported_encoding", "send the body without a content encoding", close=True)
    parts: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(timeout_s):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                part = message.get("body", b"")
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
                more = message.get("more_body", False)
    except TimeoutError:
        raise Refusal(408, "body_too_slow", f"the body did not arrive within {timeout_s:g} s", close=True) from None
    return b"".join(parts)


def parsed(
    kind: type[ChatRequest | CompletionRequest], data: bytes, head: Mapping[bytes, bytes]
) -> ChatRequest | CompletionRequest:
    """Read the JSON document; ``Refusal`` 415 or 400 names the first wrong keys, but not their values."""
    media = head.get(b"content-type", b"").split(b";")[0].strip().lower()
    if media != b"application/json":
        raise Refusal(415, "unsupported_media_type", "send `Content-Type: application/json`")
    if _parts(data) > _MOST_PARTS:
        raise Refusal(400, "invalid_request", f"the body has more than {_MOST_PARTS} keys, lists and objects")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
    if problems[0]["type"] == "json_invalid":
        raise Refusal(400, "invalid_json", "the body is not a JSON document, or is nested too deeply")
    known = [(_path(item), item) for item in problems]
    told = [
        f"unknown key `{path}`" if item["type"] == UNKNOWN_KEY else f"`{path or 'body'}`: {item['msg']}"
        for path, item in known[:_TOLD]
    ]
    more = f"; and {len(known) - _TOLD} more" if len(known) > _TOLD else ""
    raise Refusal(
        400,
        "invalid_request",
        "; ".join(told) + more,
        parameter=known[0][0].partition(".")[0] or None,
    )


def _parts(data: bytes) -> int:
    """Count a JSON document's keys, lists and objects without parsing it; an upper bound if it is small."""
    most = sum(map(data.count, (b"[", b"{", b":")))
    return most if most <= _MOST_PARTS else sum(map(_STRING.sub(b"", data).count, (b"[", b"{", b":")))


def _path(problem: ErrorDetails) -> str:
    """Return the path of an error in the body: at most three keys, including the unknown one."""
    way = [str(part)[:_LONGEST_KEY] for part in problem["loc"]]
    if problem["type"] == UNKNOWN_KEY:
        way.append(problem["ctx"]["name"])
    return ".".join(way[:3])


async def prompt_tokens(pool: Pool, request: ChatRequest | CompletionRequest) -> int:
    """Count the tokens of all prompts with the release's tokenizer; ``Refusal`` 400 if one can't fit."""
    context = pool.route.context
    if isinstance(request, CompletionRequest):
        return await pool.counter.completion(request.prompt, special=request.add_special_tokens, most=context)
    options = request.template_options()
    return await pool.counter.chat(request.plain_messages(), request.plain_tools(), options, context)


def longest_answer(pool: Pool, request: ChatRequest | CompletionRequest, prompt: int) -> int:
    """Return how many tokens an answer may have: the client's limit, or the model's default, bounded by the context.

    Raises:
        Refusal: 400 where prompt and answer don't fit into the context.
    """
    context = pool.route.context
    # For several prompts only the sum is known here; the engine checks each one.
    room = context - (prompt if request.prompts == 1 else 0)
    wanted = request.longest_answer
    if wanted is None:
        wanted = max(1, min(pool.route.default_tokens, room))
    if wanted > room:
        raise Refusal(
            400, "context_length_exceeded",
            f"this model's context is {context} tokens; the prompt has {prompt} and the answer may have {wanted}",
        )  # fmt: skip
    return wanted


def check(opened: Opened, meter: StreamMeter) -> None:
    """Read the usage of a complete answer, and give it the client's name of the model.

    Raises:
        Refusal: 502 if it is not a JSON object, or an error of the engine.
    """
    if opened.status in {401, 403, 404, 405} or not (opened.status == 200 or 400 <= opened.status < 500):
        raise Refusal(502, "replica_misconfigured", f"the model's server answered {opened.status}")
    try:
        document = json.loads(opened.body)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise Refusal(502, "bad_answer", "the model's server did not send JSON")
    if opened.status == httpx.codes.OK:
        meter.read(document)
        opened.body = meter.renamed(document) or opened.body
