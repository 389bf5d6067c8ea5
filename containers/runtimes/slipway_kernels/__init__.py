"""Linear layers for CPUs that vLLM has no fast kernel for, and a line in the engine's log that says what ran.

vLLM loads `register` in each of its processes, by the entry point ``vllm.general_plugins``. The engine's workers are
`slipway_kernels.worker.Worker` (``--worker-cls`` in the runtime's arguments), which does not start where `register` has
not run: vLLM logs a plugin that can't be imported, and goes on without it.

A worker writes one line to stderr once its model is loaded (the first of several alone)::

    slipway kernels: {"attention": "CPU_ATTN", "compute_dtype": "bfloat16", …}

behind vLLM's own prefix, if any. What follows ``slipway kernels: `` up to the line's end is a JSON object with sorted
keys, all of them always there:

- ``attention`` (string): vLLM's attention backends, joined by ``+``; ``none`` where there are none
- ``compute_dtype`` (string): what layers hand to each other: ``bfloat16``, ``float16``, ``float32``
- ``cpu_model`` (string): as /proc/cpuinfo has it; ``unknown`` where it has none
- ``instruction_set`` (string): the best that kernels may use: ``avx2``, ``avx512``, ``avx512_bf16``, ``amx``
- ``kv_cache_dtype`` (string): as ``compute_dtype``, or ``fp8`` and its like
- ``linear_16bit`` (string): what multiplies layers that are not quantized: ``float32`` (ours), ``onednn-bfloat16``,
  ``amx-bfloat16``, ``torch-bfloat16`` (torch's own loops); several joined by ``+``; ``none`` where there are none
- ``linear_quantized`` (object): class of kernel → number of layers, empty where none is quantized
- ``threads`` (integer): threads that compute
"""

from __future__ import annotations

registered = False


def register() -> None:
    """Offer our kernels to vLLM, in the process that calls this.

    What goes wrong here ends the process: vLLM guards the import of this module, and not this call. So what can fail
    when it is imported is imported here.
    """
    from slipway_kernels import packed, unquantized  # noqa: PLC0415 - see above

    global registered  # noqa: PLW0603 - vLLM calls this again in processes that it forks
    if not registered:
        packed.install()
        unquantized.install()
    registered = True
