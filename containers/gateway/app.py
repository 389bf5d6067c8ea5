"""The two applications: the API for clients (only listed paths exist), and the operator's API on its own port."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from containers.gateway import reading
from containers.gateway.errors import Refusal
from containers.gateway.exchange import Exchange
from containers.gateway.gateway import Gateway
from containers.gateway.schema import Answer, ChatRequest, CompletionRequest, ErrorAnswer, ModelList

_REFERENCE = "#/components/schemas/{model}"
_REFUSALS: dict[int | str, str] = {
    400: "The request is not valid, or exceeds the model's context or the key's limits",
    401: "The API key is missing or not valid",
    404: "Unknown model, or the key may not use it",
    408: "The request came too slowly",
    413: "The body is too large",
    415: "The body is not plain JSON",
    422: "The engine cannot process the request",
    429: "The key's limits are used up; see Retry-After",
    431: "The request's headers are too large",
    500: "The engine failed",
    502: "No replica answered",
    503: "All replicas are busy or down; see Retry-After",
}


def api(gateway: Gateway) -> FastAPI:
    """Make the application for clients. Every other path is refused."""
    app = FastAPI(
        title="Slipway's gateway", version="1", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )

    @app.post("/v1/chat/completions", **_described(ChatRequest))
    async def chat_completions() -> Response:
        """Answer a conversation."""
        return Exchange(gateway, ChatRequest, "/v1/chat/completions")

    @app.post("/v1/completions", **_described(CompletionRequest))
    async def completions() -> Response:
        """Continue a text."""
        return Exchange(gateway, CompletionRequest, "/v1/completions")

    @app.get("/v1/models", responses={401: _REFUSED[401], 429: _REFUSED[429], 400: _REFUSED[400]}, openapi_extra=_KEY)
    async def models(request: Request) -> ModelList:
        """List the models that the key may use."""
        key = await gateway.authenticate(reading.headers(request.scope), request.scope.get("client"))
        return gateway.models(key)

    @app.get("/health", responses={503: {"description": "The gateway is about to stop"}})
    async def health() -> JSONResponse:
        """Whether requests should be sent here; no key is needed."""
        return JSONResponse({"status": "draining" if gateway.draining else "ok"}, 503 if gateway.draining else 200)

    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.openapi_schema = _documented(app)
    return app


def admin(gateway: Gateway, client_api: FastAPI) -> Starlette:
    """Make the operator's application: metrics, probes, the replicas' state, and the API's description."""

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def live(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        fine = gateway.router.is_ready and not gateway.draining
        return JSONResponse({"ready": fine}, 200 if fine else 503)

    async def replicas(_: Request) -> Response:
        return JSONResponse(gateway.state().model_dump())

    async def description(_: Request) -> Response:
        return JSONResponse(client_api.openapi())

    return Starlette(
        routes=[
            Route("/metrics", metrics), Route("/health", live), Route("/ready", ready), Route("/replicas", replicas),
            Route("/openapi.json", description),
        ]
    )  # fmt: skip


async def _refused(_: Request, error: Exception) -> Response:
    refusal = error if isinstance(error, Refusal) else Refusal(500, "internal", "the gateway failed")
    headers = {name.decode(): value.decode() for name, value in refusal.headers()}
    return Response(refusal.body(), refusal.status, headers, "application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer a request for an unknown path or method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    words = {404: "unknown path", 405: "method not allowed on this path"}
    refusal = Refusal(
        status, {404: "not_found", 405: "method_not_allowed"}.get(status, "error"), words.get(status, "error")
    )
    response = await _refused(request, refusal)
    for name, value in (getattr(error, "headers", None) or {}).items():
        response.headers[name] = value
    return response


def _described(kind: type[ChatRequest | CompletionRequest]) -> dict[str, Any]:
    """Describe a path for OpenAPI. FastAPI can't derive it, because the body is read only after the key is checked."""
    schema = {"$ref": _REFERENCE.format(model=kind.__name__)}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    answer = {"description": "The answer, or with `stream` its events", "content": {"text/event-stream": {}}}
    return {
        "response_model": None,
        "responses": {200: {"model": Answer, **answer}, **_REFUSED},
        "openapi_extra": {"requestBody": body, **_KEY},
    }


def _documented(app: FastAPI) -> dict[str, Any]:
    """Return FastAPI's OpenAPI document with the request schemas and the authentication scheme added."""
    document = app.openapi()
    components = document.setdefault("components", {})
    _, bodies = models_json_schema(
        [(ChatRequest, "validation"), (CompletionRequest, "validation")], ref_template=_REFERENCE
    )
    components.setdefault("schemas", {}).update(bodies["$defs"])
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


_REFUSED: Mapping[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": words} for status, words in _REFUSALS.items()
}
_KEY: dict[str, Any] = {"security": [{"key": []}]}
