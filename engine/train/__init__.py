"""The training loop and what surrounds it: launch, callbacks, metrics, watch."""
