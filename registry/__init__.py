"""What was released: manifest, signing, promotion, pull. Imports none of the other packages."""

from registry.errors import RegistryError, VerificationError
from registry.manifest import Manifest
from registry.moves import Moved, canary, promote_version, rollback
from registry.pull import Pulled, fetch_file, pull
from registry.signing import load_trusted_keys
from registry.verify import VerificationReport, verify

__all__ = [
    "Manifest",
    "Moved",
    "Pulled",
    "RegistryError",
    "VerificationError",
    "VerificationReport",
    "canary",
    "fetch_file",
    "load_trusted_keys",
    "promote_version",
    "pull",
    "rollback",
    "verify",
]
