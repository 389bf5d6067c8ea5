"""The commands of ``slipway``, one module per subject. They import heavy packages when they run: ``--help`` is fast."""
