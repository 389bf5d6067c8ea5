"""Telling people what went wrong: to a webhook in Slack's format, and by mail. Addresses are secrets and never told.

A notice is first kept, in ``notices/`` of the home, and told by whoever delivers next. So who does not answer loses
none, and keeps nobody waiting who has one to tell.
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
# How long is delivered at a time, and how long is tried to tell of what happened.
_DELIVERY_SECONDS, _KEPT_SECONDS = 20.0, 7 * 24 * 3600.0
_FOLDER = "notices"


class NoticeError(SlipwayError):
    """Somebody could not be told; the message says by which way, and not where, as do ``ways``."""

    def __init__(self, message: str, ways: Collection[str]) -> None:
        super().__init__(message)
        self.ways = ways


@dataclass(frozen=True)
class Notice:
    """What is to be told: a line, the reason, and where to look."""

    subject: str
    reason: str
    link: str

    @property
    def text(self) -> str:
        """All of it, a part a line."""
        return f"{self.subject}\n{self.reason}\n{self.link}"


def keep(notice: Notice, settings: Settings) -> None:
    """Keep a notice until it is delivered, by every way that is configured now."""
    if ways := list(_ways(notice, settings)):
        folder = settings.home / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / f"{time.time_ns():020}.json", notice, ways)


def deliver(settings: Settings) -> list[str]:
    """Tell what is kept, the oldest first; return what could not be told now, and stays kept for a week."""
    troubles: list[str] = []
    silent: set[str] = set()
    until = time.monotonic() + _DELIVERY_SECONDS
    for path in sorted((settings.home / _FOLDER).glob("*.json")):
        if time.monotonic() > until:
            break
        kept = json.loads(path.read_text())
        notice, wanted = Notice(**kept["notice"]), kept["ways"]
        try:
            send(notice, settings, [way for way in wanted if way not in silent])
        except NoticeError as error:
            troubles.append(str(error))
            silent |= set(error.ways)
        left = [way for way in wanted if way in silent]
        if not left or time.time() - int(path.stem) / 1e9 > _KEPT_SECONDS:
            path.unlink()
        elif left != wanted:
            _write(path, notice, left)
    return troubles


def send(notice: Notice, settings: Settings, only: Collection[str] = ("webhook", "mail")) -> None:
    """Tell everybody who is to be told, by these ways; what does not answer is asked three times.

    Raises:
        NoticeError: one of the ways failed; the others were taken.
    """
    tried = {way: _tried(tell) for way, tell in _ways(notice, settings).items() if way in only}
    failed = {way: wrong for way, wrong in tried.items() if wrong}
    if failed:
        words = "; ".join(f"{way}: {wrong}" for way, wrong in failed.items())
        raise NoticeError(f"could not tell of `{notice.subject}`: {words}", failed.keys())


def _ways(notice: Notice, settings: Settings) -> Mapping[str, Callable[[], None]]:
    """How to tell a notice, by each way that is configured."""
    ways: dict[str, Callable[[], None]] = {}
    if settings.webhook:
        ways["webhook"] = lambda: _post(notice, settings.webhook or "")
    if settings.mail_to and settings.mail_server:
        ways["mail"] = lambda: _mail(notice, settings.mail_server or "", settings.mail_to)
    return ways


def _write(path: Path, notice: Notice, ways: Collection[str]) -> None:
    write_atomically(path, json.dumps({"notice": asdict(notice), "ways": list(ways)}))


def _tried(tell: Callable[[], None]) -> str | None:
    """Try a way until it is taken; return what is wrong with it, if anything."""
    for pause in (*_PAUSES_SECONDS, None):
        try:
            tell()
        except (httpx.HTTPError, smtplib.SMTPException, OSError) as error:
            # Not the error's own words: httpx has the address in them, and the address is the secret.
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else type(error).__name__
            if pause is None:
                return str(status)
            time.sleep(pause)
        except (NetworkSettingError, httpx.InvalidURL, ValueError):  # their words may have the address in them, too
            return "its address, or the proxy or the certificates that are set, can't be used"
        else:
            break
    return None


def _post(notice: Notice, webhook: str) -> None:
    """Slack's incoming webhooks, and what speaks like them: ``{"text": …}``, with ``&``, ``<`` and ``>`` escaped."""
    body = {"text": html.escape(notice.text, quote=False)}
    with httpx.Client(verify=tls(), proxy=proxy_for(webhook), trust_env=False, timeout=_TIMEOUT_SECONDS) as client:
        client.post(webhook, json=body).raise_for_status()


def _mail(notice: Notice, server: str, recipients: tuple[str, ...]) -> None:
    """Over TLS, from the start (``smtps``) or before anybody says who they are (``smtp`` with a user)."""
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
