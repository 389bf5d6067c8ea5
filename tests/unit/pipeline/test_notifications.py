"""Failures and refusals are told: over real HTTP and SMTP, with the reason and the link, and no address told."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from dagster import (
    DagsterEventType,
    DagsterInstance,
    Failure,
    build_run_status_sensor_context,
    job,
    op,
)
from recording_server import own_certificate, recording

from pipeline.operations import notifications
from pipeline.operations.notifications import Notification, NotificationError, deliver, enqueue, send
from pipeline.orchestration import automation
from pipeline.settings import Settings
from webhook_server import Webhook, listening

NOTICE = Notification("demo|awq refused", "drift: accuracy < 0.9 & falling", "http://ui/runs/1")


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with listening() as found:
        yield found


@pytest.fixture
def mails() -> list[str]:
    return []


@pytest.fixture
def mail_server(mails: list[str]) -> Iterator[str]:
    class Handler(socketserver.StreamRequestHandler):
        """As much of SMTP as one plain message takes."""

        def handle(self) -> None:
            self.wfile.write(b"220 here\r\n")
            for line in self.rfile:
                word = line.split()[0].upper()
                if word == b"DATA":
                    self.wfile.write(b"354 go on\r\n")
                    mails.append(b"".join(iter(self.rfile.readline, b".\r\n")).decode())
                self.wfile.write(b"250 ok\r\n" if word != b"QUIT" else b"221 bye\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"smtp://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(notifications, "_PAUSES_SECONDS", (0.0, 0.0))
    return Settings.read({"SLIPWAY_HOME": str(tmp_path), "SLIPWAY_UI_ADDRESS": "https://slipway.example/"})


def test_a_webhook_gets_slacks_format_with_its_special_characters_escaped(webhook: Webhook, settings: Settings) -> None:
    send(NOTICE, replace(settings, webhook=webhook.url))
    assert webhook.texts == ["demo|awq refused\ndrift: accuracy &lt; 0.9 &amp; falling\nhttp://ui/runs/1"]


def test_a_mail_has_the_reason_and_the_link(mails: list[str], mail_server: str, settings: Settings) -> None:
    send(NOTICE, replace(settings, mail_server=mail_server, mail_to=("a@example.org", "b@example.org")))
    (mail,) = mails
    assert "Subject: [slipway] demo|awq refused" in mail
    assert "To: a@example.org, b@example.org" in mail
    assert NOTICE.reason in mail
    assert NOTICE.link in mail


def test_who_is_busy_is_asked_again(webhook: Webhook, settings: Settings) -> None:
    webhook.busy = 2
    send(NOTICE, replace(settings, webhook=webhook.url))
    assert len(webhook.texts) == 1


def test_one_way_that_fails_keeps_no_other_from_being_taken_and_its_address_is_not_told(
    webhook: Webhook, mails: list[str], mail_server: str, settings: Settings
) -> None:
    webhook.busy = 9
    both = replace(settings, webhook=webhook.url, mail_server=mail_server, mail_to=("a@example.org",))
    with pytest.raises(NotificationError, match="webhook: 503") as caught:
        send(NOTICE, both)
    assert len(mails) == 1
    assert "secret" not in str(caught.value) + repr(both)


@pytest.mark.parametrize("wrong", ["address", "proxy", "certificates"])
def test_a_way_that_is_set_wrongly_keeps_no_other_from_being_taken(
    wrong: str, mails: list[str], mail_server: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "https://hooks.invalid:x/secret" if wrong == "address" else "https://hooks.invalid/secret"
    if wrong == "proxy":
        monkeypatch.setenv("HTTPS_PROXY", "socks5://proxy.invalid:1")
    if wrong == "certificates":
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere.pem")
    both = replace(settings, webhook=address, mail_server=mail_server, mail_to=("a@example.org",))
    with pytest.raises(NotificationError, match="webhook: the address, the proxy or the certificates") as caught:
        send(NOTICE, both)
    assert len(mails) == 1
    assert "secret" not in str(caught.value)


def test_what_could_not_be_told_is_told_later_and_only_by_the_way_that_failed(
    webhook: Webhook, mails: list[str], mail_server: str, settings: Settings
) -> None:
    both = replace(settings, webhook=webhook.url, mail_server=mail_server, mail_to=("a@example.org",))
    webhook.busy = 3
    later = replace(NOTICE, subject="demo|gptq refused")
    for notice in (NOTICE, later):
        enqueue(notice, both)
    assert deliver(both) == ["can't send the notification `demo|awq refused`: webhook: 503"]
    assert (len(mails), webhook.texts) == (2, [])
    assert deliver(both) == []
    assert len(mails) == 2
    assert [text.splitlines()[0] for text in webhook.texts] == ["demo|awq refused", "demo|gptq refused"]
    assert deliver(both) == []
    assert len(webhook.texts) == 2


def test_what_could_not_be_told_for_a_week_is_given_up(webhook: Webhook, settings: Settings) -> None:
    told = replace(settings, webhook=webhook.url)
    webhook.busy = 9
    enqueue(NOTICE, told)
    (kept,) = (settings.home / "notices").iterdir()
    kept.rename(kept.with_stem("1"))
    assert deliver(told) == ["can't send the notification `demo|awq refused`: webhook: 503"]
    assert list((settings.home / "notices").iterdir()) == []


def test_where_nobody_is_to_be_told_nothing_is_kept(settings: Settings) -> None:
    enqueue(NOTICE, settings)
    assert not (settings.home / "notices").exists()


Tell = Callable[[Callable[[], None]], None]


@pytest.fixture
def tell(webhook: Webhook, settings: Settings) -> Tell:
    """Run a job of one step that fails so, and let the sensor hear of it."""

    def run(step: Callable[[], None]) -> None:
        @job
        def small() -> None:
            op(name="quantized")(step)()

        with DagsterInstance.ephemeral() as instance:
            tags = {"dagster/partition": "demo|awq"}
            result = small.execute_in_process(instance=instance, raise_on_error=False, tags=tags)
            (failed,) = [event for event in result.all_events if event.event_type == DagsterEventType.RUN_FAILURE]
            context = build_run_status_sensor_context(
                "failure_alert_sensor", failed, instance, result.dagster_run,
                resources={"settings": replace(settings, webhook=webhook.url)},
            )  # fmt: skip
            automation.failure_alert_sensor(context.for_run_failure())
            assert deliver(replace(settings, webhook=webhook.url)) == []

    return run


def test_a_failed_run_is_told_with_its_reason_and_where_to_look(webhook: Webhook, tell: Tell) -> None:
    def quantized() -> None:
        raise Failure("the disk is full", allow_retries=False)

    tell(quantized)
    ((subject, reason, link),) = [text.splitlines() for text in webhook.texts]
    assert subject == "demo|awq failed"
    assert reason == "quantized: the disk is full"
    assert link.startswith("https://slipway.example/runs/")


def test_a_mail_server_over_tls_must_be_who_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = own_certificate(tmp_path / "server.pem")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.setattr(notifications, "_PAUSES_SECONDS", ())
    with recording(certificate=certificate) as server:
        place = server.address.replace("https://", "smtps://ann:word@")
        settings = replace(Settings.read({}), mail_server=place, mail_to=("ops@example.com",))
        with pytest.raises(NotificationError, match="SSLCertVerificationError") as caught:
            send(NOTICE, settings)
        assert "word" not in str(caught.value)
        monkeypatch.setattr(notifications, "_TIMEOUT_SECONDS", 2.0)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with pytest.raises(NotificationError) as caught:  # it speaks HTTP, and is believed by now
            send(NOTICE, settings)
        assert "SSL" not in str(caught.value)
