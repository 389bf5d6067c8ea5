"""A model hub that means harm: every answer is bounded, and ends in one line that names the hub."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session
from recording_server import Answer, Asked, Recording, recording, trickle

from pipeline.errors import SourceError, UnreachableError
from pipeline.sources import hub as hubs
from pipeline.sources.hub import Hub, HubModel
from pipeline.sources.origin import SourceFile, read_range
from pipeline.sources.source import ResolvedSource, pull
from registry import download, network

COMMIT = "0" * 40
FILE = SourceFile("a.json", 10_000, blob="a" * 40)
Ask = Callable[[Hub, Path], object]
ASKED: dict[str, Ask] = {
    "revision": lambda hub, _: hub.revision("org/tiny", "main"),
    "read": lambda hub, _: read_range(HubModel(hub, "org/tiny", COMMIT), COMMIT, FILE, 0, FILE.size),
    "download": lambda hub, folder: pull(
        ResolvedSource(HubModel(hub, "org/tiny", COMMIT), COMMIT, (FILE,), ()),
        folder,
        folder / "downloads",
        lambda _: None,
    ),
}
every_question = pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recording]:
    monkeypatch.setattr(download, "_FIRST_PAUSE", 0.001)
    with recording() as started:
        yield started


def refusal(started: Recording, folder: Path, asked: Ask, answer: Answer | Callable[[Asked], Answer]) -> str:
    """Ask, and return the one line of the error that follows."""
    started.answer = answer if callable(answer) else lambda _: answer
    with pytest.raises(SourceError) as caught:
        asked(Hub(started.address, None), folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("status", [200, 302, 500])
@every_question
def test_a_compressed_answer_is_not_unpacked(hostile: Recording, tmp_path: Path, asked: Ask, status: int) -> None:
    bomb = Answer(status, {"Content-Encoding": "gzip", "Location": "/"}, gzip.compress(b" " * (32 << 20)))
    tracemalloc.start()
    said = refusal(hostile, tmp_path, asked, bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "sent a compressed answer" in said
    assert peak < 8 << 20
    assert {request.headers["Accept-Encoding"] for request in hostile.asked} == {"identity"}


@pytest.mark.parametrize(("asked", "said"), [("revision", "sent more than"), ("download", "differ from the digests")])
def test_an_endless_answer_is_not_read_to_its_end(hostile: Recording, tmp_path: Path, asked: str, said: str) -> None:
    endless = itertools.repeat(b"x" * 65536)
    assert said in refusal(hostile, tmp_path, ASKED[asked], Answer(body=endless))


@pytest.mark.parametrize("status", [302, 401, 403, 404, 500])
@every_question
def test_of_a_refusal_no_body_is_read(hostile: Recording, tmp_path: Path, asked: Ask, status: int) -> None:
    refused = Answer(status, {"Location": "/again"}, itertools.repeat(b"x" * 65536))
    refusal(hostile, tmp_path, asked, lambda request: Answer(404) if request.target == "/again" else refused)


@every_question
def test_an_answer_has_a_longest_time(
    hostile: Recording, tmp_path: Path, asked: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(hubs, "_DOCUMENT_SECONDS", 0.1)
    said = refusal(hostile, tmp_path, asked, Answer(body=trickle()))
    assert "took more than 0.1 s" in said or "too slow" in said


def test_a_download_that_breaks_off_again_and_again_has_a_longest_time(
    hostile: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "ANSWER_SECONDS", 0.1)
    said = refusal(hostile, tmp_path, ASKED["download"], lambda request: Answer(
        206 if "Range" in request.headers else 200, {}, b"x"
    ))  # fmt: skip
    assert "too slow" in said
    (part,) = tmp_path.rglob("a.json.part")
    assert set(part.read_bytes()) == {ord("x")}


@pytest.mark.parametrize("headers", [{"Retry-After": "86400"}, {"RateLimit": '"api";r=0;t=86400'}], ids=str)
@pytest.mark.parametrize("status", [408, 429])
def test_a_hub_does_not_say_how_long_to_wait(
    hostile: Recording, tmp_path: Path, status: int, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert f"answers {status}" in refusal(hostile, tmp_path, ASKED["download"], Answer(status, headers))
    assert max(pauses) < 1


def test_a_download_goes_on_once_the_hub_is_no_longer_busy(hostile: Recording, tmp_path: Path) -> None:
    content, answers = b"x" * FILE.size, [Answer(429), Answer(503), Answer(522), Answer(body=b"x" * FILE.size)]
    hostile.answer = lambda _: answers.pop(0)
    hub = HubModel(Hub(hostile.address, None), "org/tiny", COMMIT)
    with (tmp_path / "a.json").open("w+b") as file:
        found = download.fill(
            "a.json", file.fileno(), 0, FILE.size, lambda start: hub.open(COMMIT, FILE, start), lambda _: None
        )
    assert found == hashlib.sha256(content).hexdigest()
    assert answers == []


def test_a_warning_of_the_hub_is_not_printed(hostile: Recording, capfd: pytest.CaptureFixture[str]) -> None:
    body = json.dumps({"sha": COMMIT, "siblings": []}).encode()
    hostile.answer = lambda _: Answer(headers={"X-HF-Warning": "topic; \x1b[2Kall is well"}, body=body)
    assert Hub(hostile.address, None).revision("org/tiny", "main") == (COMMIT, ())
    assert "all is well" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("location", ["http://[", "http://xn--a/", "http://x:99999/", "http://\xff/", "\x01"])
@every_question
def test_a_redirect_to_what_is_no_address_is_not_followed(
    hostile: Recording, tmp_path: Path, asked: Ask, location: str
) -> None:
    refusal(hostile, tmp_path, asked, Answer(302, {"Location": location}))


def a_file(**changes: object) -> bytes:
    file = {"rfilename": "config.json", "size": 3, "blobId": "a" * 40}
    return json.dumps({"sha": COMMIT, "siblings": [{**file, **changes}]}).encode()


WRONG = [
    b"", b"null", b"[]", b"3", b"<html>", b"\xff", b"[" * 100_000, b'{"sha":' * 5_000, b'{"siblings": []}',
    b"[" + b"{}," * 1_000_001 + b"{}]",
    json.dumps({"sha": COMMIT, "siblings": 3}).encode(),
    json.dumps({"sha": COMMIT, "siblings": [3]}).encode(),
    a_file(rfilename=None), a_file(rfilename=[]),
    a_file(size=None), a_file(size=-1), a_file(size=True), a_file(size="3"),
    a_file(blobId="x"), a_file(blobId=3), a_file(lfs="x"), a_file(lfs=[1]), a_file(lfs={"sha256": "../x"}),
]  # fmt: skip


@pytest.mark.parametrize("body", WRONG, ids=lambda body: repr(body[-50:]))
def test_a_revision_has_its_form_or_is_refused(hostile: Recording, tmp_path: Path, body: bytes) -> None:
    said = refusal(hostile, tmp_path, ASKED["revision"], Answer(body=body))
    assert hostile.address in said
    assert len(said) < 400


def test_a_hub_that_is_busy_may_be_asked_again(hostile: Recording, tmp_path: Path) -> None:
    hostile.answer = lambda _: Answer(503)
    with pytest.raises(UnreachableError):
        ASKED["revision"](Hub(hostile.address, None), tmp_path)


def test_a_hub_on_this_machine_is_asked_through_no_proxy(hostile: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    close_session()
    hostile.answer = lambda _: Answer(body=json.dumps({"sha": COMMIT, "siblings": []}).encode())
    with recording() as proxy:
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, proxy.address)
        try:
            assert Hub(hostile.address, None).revision("org/tiny", "main") == (COMMIT, ())
        finally:
            close_session()
        assert proxy.asked == []


@pytest.mark.parametrize("proxy", ["socks5://proxy.invalid:1", "ftp://proxy.invalid"])
def test_a_proxy_that_can_not_be_used_is_one_line(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    close_session()
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(SourceError, match="set HTTPS_PROXY to http://HOST:PORT"):
        Hub("https://hub.invalid", None).revision("org/tiny", "main")
