"""Telling people what went wrong: to a webhook in Slack's format, and by mail. Addresses are secrets and never told."""

from __future__ import annotations

import html
import smtplib
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.message import EmailMessage
from urllib.parse import unquote, urlsplit

import httpx

from pipeline.errors import SlipwayError
from pipeline.settings import Settings

_TIMEOUT_SECONDS = 10.0
_PAUSES_SECONDS = (1.0, 3.0)


class NoticeError(SlipwayError):
    """Somebody could not be told; the message says by which way, and not where."""


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


def send(notice: Notice, settings: Settings) -> None:
    """Tell everybody who is to be told; what does not answer is asked three times.

    Raises:
        NoticeError: one of the ways failed; the others were taken.
    """
    failed = []
    if settings.webhook:
        failed += _tried("webhook", lambda: _post(notice, settings.webhook or ""))
    if settings.mail_to and settings.mail_server:
        failed += _tried("mail", lambda: _mail(notice, settings.mail_server or "", settings.mail_to))
    if failed:
        raise NoticeError(f"could not tell of `{notice.subject}`: {'; '.join(failed)}")


def _tried(way: str, tell: Callable[[], None]) -> list[str]:
    """Try a way until it is taken; return what is wrong with it, if anything."""
    for pause in (*_PAUSES_SECONDS, None):
        try:
            tell()
        except (httpx.HTTPError, smtplib.SMTPException, OSError) as error:
            # Not the error's own words: httpx has the address in them, and the address is the secret.
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else type(error).__name__
            if pause is None:
                return [f"{way}: {status}"]
            time.sleep(pause)
        else:
            break
    return []


def _post(notice: Notice, webhook: str) -> None:
    """Slack's incoming webhooks, and what speaks like them: ``{"text": …}``, with ``&``, ``<`` and ``>`` escaped."""
    body = {"text": html.escape(notice.text, quote=False)}
    httpx.post(webhook, json=body, timeout=_TIMEOUT_SECONDS).raise_for_status()


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
        smtplib.SMTP_SSL(host, place.port or 465, timeout=_TIMEOUT_SECONDS)
        if place.scheme == "smtps"
        else smtplib.SMTP(host, place.port or 25, timeout=_TIMEOUT_SECONDS)
    ) as client:
        if user:
            if place.scheme == "smtp":
                client.starttls(context=ssl.create_default_context())
            client.login(user, unquote(place.password or ""))
        client.send_message(message)
