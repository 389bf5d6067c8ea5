"""`slipway ui` against other web pages: over plain HTTP, and in a real browser that has such a page open."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from browser import chromium
from homes import Slipway, make_home
from pipeline.settings import Settings
from ui_server import REPOSITORY, Ui

SELECTOR = "{" + ", ".join(f"{key}: {json.dumps(value)}" for key, value in REPOSITORY.items()) + "}"

# Everything that a page may send elsewhere without being asked for leave; then what a WebSocket and a frame say.
PAGE = """<body><script>
const dagster = "DAGSTER", mlflow = "MLFLOW", mutation = MUTATION, model = JSON.stringify({name: "attacked"});
const post = (url, body, type) =>
  fetch(url, {method: "POST", mode: "no-cors", headers: {"Content-Type": type}, body}).catch(() => 0);
const image = url => new Promise(done => { const it = new Image(); it.onload = it.onerror = done; it.src = url; });
const socket = () => new Promise(done => {
  const it = new WebSocket(dagster.replace("http", "ws") + "/graphql", "graphql-ws");
  it.onopen = () => done("open"); it.onerror = it.onclose = () => done("closed");
});
window.attack = async () => {
  const query = "?query=" + encodeURIComponent(mutation);
  await post(dagster + "/graphql", JSON.stringify({query: mutation}), "text/plain");
  await post(dagster + "/graphql", "query=" + encodeURIComponent(mutation), "application/x-www-form-urlencoded");
  await post(dagster + "/graphql" + query, "", "text/plain");
  await image(dagster + "/graphql" + query);
  await fetch(dagster + "/graphql" + query, {mode: "no-cors"}).catch(() => 0);
  await post(mlflow + "/ajax-api/2.0/mlflow/registered-models/create", model, "text/plain");
  await post(mlflow + "/api/2.0/mlflow/registered-models/create", model, "text/plain");
  return await socket();
};
</script></body>"""

SOCKET = """new Promise(done => {
  const it = new WebSocket("ADDRESS/graphql", "graphql-ws");
  it.onopen = () => done("open"); it.onerror = it.onclose = () => done("closed");
})"""


def mutation(name: str) -> str:
    """What changes something, visibly: a model's partition."""
    return (
        f'mutation {{ addDynamicPartition(repositorySelector: {SELECTOR}, partitionsDefName: "model",'
        f' partitionKey: "{name}") {{ __typename }} }}'
    )


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> Iterator[Ui]:
    started = Ui(Slipway(make_home(tmp_path_factory.mktemp("ui") / "home", machine)))
    started.announced()
    yield started
    started.end(signal.SIGTERM)


def there(ui: Ui, name: str) -> bool:
    """Whether Dagster has the partition, or MLflow the model."""
    added = ui(mutation(name))["addDynamicPartition"]["__typename"]  # which says whether it was there before
    models = httpx.get(f"{mlflow(ui)}/api/2.0/mlflow/registered-models/search", trust_env=False).json()
    return added != "AddDynamicPartitionSuccess" or name in str(models)


def dagster(ui: Ui) -> str:
    return f"http://127.0.0.1:{ui.port}"


def mlflow(ui: Ui) -> str:
    return f"http://127.0.0.1:{ui.port + 1}"


@contextmanager
def page(content: str) -> Iterator[int]:
    """Serve a page at another port of this machine, as another user's program may; gives the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def test_what_the_attacks_send_does_something_when_it_comes_from_a_program(ui: Ui) -> None:
    assert not there(ui, "control")
    assert there(ui, "control")


def test_a_request_under_a_foreign_name_or_from_another_page_changes_nothing(ui: Ui) -> None:
    query = {"query": mutation("foreign")}
    foreign = {"Host": "attacker.example"}
    with httpx.Client(trust_env=False, timeout=30) as client:
        address = f"{dagster(ui)}/graphql"
        model = f"{mlflow(ui)}/api/2.0/mlflow/registered-models/create"
        answers = [
            client.get(f"{address}?query={quote(query['query'])}", headers=foreign),
            client.get(f"{address}?query={quote(query['query'])}"),
            client.post(address, json=query, headers=foreign),
            client.post(address, json=query, headers={"Origin": "https://attacker.example"}),
            client.post(address, json=query, headers={"Origin": mlflow(ui)}),
            client.post(model, json={"name": "foreign"}, headers=foreign),
            client.post(model, json={"name": "foreign"}, headers={"Origin": "http://localhost:8000"}),
        ]
    assert [answer.status_code for answer in answers] == [403] * len(answers)
    assert not there(ui, "foreign")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_page_that_the_browser_has_open_changes_nothing_and_this_ones_own_socket_opens(
    ui: Ui, host: str, tmp_path: Path
) -> None:
    name = f"attacked-{host}"
    content = PAGE.replace("DAGSTER", dagster(ui)).replace("MLFLOW", mlflow(ui))
    content = content.replace("MUTATION", json.dumps(mutation(name))).replace('"attacked"', json.dumps(name))
    with page(content) as port, chromium(dagster(ui), tmp_path) as browser:
        browser.page.goto(f"http://{host}:{port}/")
        assert browser.page.evaluate("attack()") == "closed"
        assert not there(ui, name)
        # A link from there leads to Dagster's page, whose own subscriptions work.
        browser.page.evaluate(f"location.href = '{dagster(ui)}/asset-groups'")
        browser.sees("quantized")
        assert browser.page.evaluate(SOCKET.replace("ADDRESS", dagster(ui).replace("http", "ws"))) == "open"
        browser.page.goto(mlflow(ui))
        browser.sees("Experiments")
