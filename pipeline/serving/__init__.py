"""`slipway serve` and the UI: servers that Slipway starts and ends."""
