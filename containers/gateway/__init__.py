"""The way to a release's replicas: an OpenAI-compatible API with keys, limits, routing and metrics.

It runs as a process of its own, in the `gateway` environment (requirements/gateway.txt): ``python -m containers.gateway
--config FILE``. The orchestrator imports `keys` and `config` alone, which need pydantic and nothing more.
"""
