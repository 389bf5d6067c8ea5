"""The signing key and the trusted keys, from the settings."""

from __future__ import annotations

from pipeline.settings import Settings
from registry.policy import Policy, Trust
from registry.signing import SigningKey, load_key, load_or_create_key, load_trusted_keys, with_certificates


def trust_of(settings: Settings) -> Trust:
    """Return the policy that ``SLIPWAY_POLICY`` names; else the keys of ``SLIPWAY_TRUSTED_KEYS``; else the home's own.

    Raises:
        PolicyError, SigningError: The policy or a key can't be read.
    """
    return Policy.load(settings.policy) if settings.policy is not None else load_trusted_keys(settings.trusted_keys)


def signing_key(settings: Settings) -> SigningKey:
    """Return the key that signs releases, made on first use, with its certificate if the settings name one.

    Raises:
        SigningError: The key or the certificate can't be read, or they do not belong together.
    """
    return _certified(load_or_create_key(settings.signing_key), settings)


def signing_key_if_any(settings: Settings) -> SigningKey | None:
    """Return the signing key if it exists; errors as `signing_key`."""
    return _certified(load_key(settings.signing_key), settings) if settings.signing_key.exists() else None


def _certified(key: SigningKey, settings: Settings) -> SigningKey:
    return key if settings.signing_certificate is None else with_certificates(key, settings.signing_certificate)
