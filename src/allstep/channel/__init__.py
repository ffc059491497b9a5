"""The control channel: how ranks, and the services that watch over them, speak of arrivals, progress and ends.

Standard library only, so that a launching parent and a sidecar can use it without importing torch. Import from the
modules: `client` and `pulse` in a rank, `hub` or `relay` in whatever drives a service.
"""
