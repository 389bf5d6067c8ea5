"""Sends notifications of failures and refusals to a webhook in Slack's format, and by mail. Addresses are secrets.

A notification is first queued in ``notices/`` of the home; `deliver` sends the queue. So a run never waits for a server
that does not answer, and no notification is lost.
"""

from __future__ import annotations

import html
import json
import smtplib
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from email.message import EmailMessage
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx

from pipeline.errors import SlipwayError
from pipeline.settings import Settings
from registry.atomic_write import write_atomically
from registry.errors import NetworkSettingError
from registry.network import proxy_for, tls

_TIMEOUT_SECONDS = 10.0
_PAUSES_SECONDS = (1.0, 3.0)
# How long one call of `deliver` takes at most, and how long a notification is kept and tried.
_DELIVERY_SECONDS, _EXPIRY_SECONDS = 20.0, 7 * 24 * 3600.0
_FOLDER = "notices"


class NotificationError(SlipwayError):
    """A notification could not be sent; names the channels (``ways``) that failed, never their addresses."""

    def __init__(self, message: str, ways: Collection[str]) -> None:
        super().__init__(message)
        self.ways = ways


@dataclass(frozen=True)
class Notification:
    """A notification: a subject, the reason, and a link to the details."""

    subject: str
    reason: str
    link: str

    @property
    def text(self) -> str:
        """All parts, one per line."""
        return f"{self.subject}\n{self.reason}\n{self.link}"


def enqueue(notice: Notification, settings: Settings) -> None:
    """Queue a notification for every channel that is configured now."""
    if ways := list(_ways(notice, settings)):
        folder = settings.home / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / f"{time.time_ns():020}.json", notice, ways)


def deliver(settings: Settings) -> list[str]:
    """Deliver queued notifications, the oldest first; return the errors. Undelivered ones stay queued for a week."""
    troubles: list[str] = []
    silent: set[str] = set()
    until = time.monotonic() + _DELIVERY_SECONDS
    for path in sorted((settings.home / _FOLDER).glob("*.json")):
        if time.monotonic() > until:
            break
        kept = json.loads(path.read_text())
        notice, wanted = Notification(**kept["notice"]), kept["ways"]
        try:
            send(notice, settings, [way for way in wanted if way not in silent])
        except NotificationError as error:
            troubles.append(str(error))
            silent |= set(error.ways)
        left = [way for way in wanted if way in silent]
        if not left or time.time() - int(path.stem) / 1e9 > _EXPIRY_SECONDS:
            path.unlink()
        elif left != wanted:
            _write(path, notice, left)
    return troubles


def send(notice: Notification, settings: Settings, only: Collection[str] = ("webhook", "mail")) -> None:
    """Send a notification through these channels, with up to three attempts each.

    Raises:
        NotificationError: a channel failed; the others received the notification.
    """
    tried = {way: _tried(attempt) for way, attempt in _ways(notice, settings).items() if way in only}
    failed = {way: wrong for way, wrong in tried.items() if wrong}
    if failed:
        words = "; ".join(f"{way}: {wrong}" for way, wrong in failed.items())
        raise NotificationError(f"can't send the notification `{notice.subject}`: {words}", failed.keys())


def _ways(notice: Notification, settings: Settings) -> Mapping[str, Callable[[], None]]:
    """A function that sends the notification, for each configured channel."""
    ways: dict[str, Callable[[], None]] = {}
    if settings.webhook:
        ways["webhook"] = lambda: _post(notice, settings.webhook or "")
    if settings.mail_to and settings.mail_server:
        ways["mail"] = lambda: _mail(notice, settings.mail_server or "", settings.mail_to)
    return ways


def _write(path: Path, notice: Notification, ways: Collection[str]) -> None:
    write_atomically(path, json.dumps({"notice": asdict(notice), "ways": list(ways)}))


def _tried(attempt: Callable[[], None]) -> str | None:
    """Call ``attempt`` until it succeeds, at most three times; return the last error, if any."""
    for pause in (*_PAUSES_SECONDS, None):
        try:
            attempt()
        except (httpx.HTTPError, smtplib.SMTPException, OSError) as error:
            # Not the error's own text: httpx puts the address into it, and the address is a secret.
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else type(error).__name__
            if pause is None:
                return str(status)
            time.sleep(pause)
        except (NetworkSettingError, httpx.InvalidURL, ValueError):  # their text may hold the address too
            return "the address, the proxy or the certificates in the settings can't be used"
        else:
            break
    return None


def _post(notice: Notification, webhook: str) -> None:
    """Post to a webhook in Slack's format: ``{"text": …}``, with ``&``, ``<`` and ``>`` escaped."""
    body = {"text": html.escape(notice.text, quote=False)}
    with httpx.Client(verify=tls(), proxy=proxy_for(webhook), trust_env=False, timeout=_TIMEOUT_SECONDS) as client:
        client.post(webhook, json=body).raise_for_status()


def _mail(notice: Notification, server: str, recipients: tuple[str, ...]) -> None:
    """Send a mail, over TLS from the start (``smtps``) or before the login (``smtp`` with a user)."""
    place = urlsplit(server)
    message = EmailMessage()
    message["Subject"] = f"[slipway] {notice.subject}"
    user = unquote(place.username or "")
    message["From"] = user if "@" in user else f"slipway@{place.hostname}"
    message["To"] = ", ".join(recipients)
    message.set_content(f"{notice.reason}\n\n{notice.link}\n")
    host = place.hostname or ""
    with (
        smtplib.SMTP_SSL(host, place.port or 465, timeout=_TIMEOUT_SECONDS, context=tls())
        if place.scheme == "smtps"
        else smtplib.SMTP(host, place.port or 25, timeout=_TIMEOUT_SECONDS)
    ) as client:
        if user:
            if place.scheme == "smtp":
                client.starttls(context=tls())
            client.login(user, unquote(place.password or ""))
        client.send_message(message)
