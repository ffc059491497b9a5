"""The version, in one place: read by the build, by `allstep --version` and by checkpoints."""

__version__ = "0.1.0"
