"""The gateway: a proxy in front of a release's replicas, with an OpenAI-compatible API, keys, limits and metrics.

It runs as a process of its own, in the `gateway` environment (requirements/gateway.txt): ``python -m containers.gateway
--config FILE``. The orchestrator imports `keys` and `config` alone, which need pydantic and nothing more.
"""
