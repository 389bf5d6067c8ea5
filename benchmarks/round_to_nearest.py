"""Worker: FP16's linear layers rounded to few bits, each row one group, and written as plain weights.

Request: `source`, `output` (folders), `bits`. What a quantizer does that looks at nothing: the least that any other
must beat.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slipway_worker import main


def work(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """Round every linear layer of the decoder and copy the rest."""
    import torch
    from safetensors.torch import load_file, save_file

    source, output = Path(request["source"]), Path(request["output"])
    report(f"rounding to {request['bits']} bits")
    tensors = load_file(source / "model.safetensors")
    for name, weight in tensors.items():
        if ".layers." in name and weight.ndim == 2:
            low, high = weight.float().amin(dim=1, keepdim=True), weight.float().amax(dim=1, keepdim=True)
            step = (high - low) / (2 ** request["bits"] - 1)
            rounded = torch.round((weight.float() - low) / step) * step + low
            tensors[name] = rounded.to(weight.dtype)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    for path in source.glob("*.json"):
        shutil.copyfile(path, output / path.name)
    return {}


if __name__ == "__main__":
    main(work)
