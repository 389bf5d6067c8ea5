"""Verifies a model while vLLM loads it: a model loader, and the entry point of every runtime's image.

The entry point (``python -m slipway_loader MODULE …``) checks configuration, tokenizer, templates and adapters, adds
``--load-format slipway``, and runs the module, vLLM's server. vLLM calls `register` in each of its processes (entry
point ``vllm.general_plugins``), which offers the loader under that name and takes every other away. So a start without
the plugin stops as well: vLLM then knows no such format.

What differs from what was signed ends the start with status 78 and one line::

    slipway loader: refused: /model/model.safetensors: changed: another sha256 than in the manifest

Where all is well, one rank of the engine writes what was read to stderr: ``slipway loader: `` and a JSON object with
``bytes`` and ``files`` (of all ranks of a host), ``ranks`` and ``seconds``, in which the model took in its weights too.
"""

from __future__ import annotations

import os
from pathlib import Path

from registry.errors import VerificationError

LOAD_FORMAT = "slipway"
STATE = "SLIPWAY_LOADER_STATE"
"""Names the folder in which the entry point and the engine's processes leave each other `EXPECTED` and `REASON`."""
EXPECTED, REASON = "expected.json", "refused"


def register() -> None:
    """Offer our loader to vLLM in this process, in place of all others; whoever replaced the entry point has none."""
    if STATE not in os.environ:
        return
    from slipway_loader import loader  # noqa: PLC0415 - vLLM guards the import of this module, and not this call

    loader.install()


def refuse(error: VerificationError) -> None:
    """Leave the entry point the reason why an engine's process stops."""
    first, *others = error.problems
    more = f"; and {len(others)} more" if others else ""
    (Path(os.environ[STATE]) / REASON).write_text(f"{first}{more}", encoding="utf-8")
