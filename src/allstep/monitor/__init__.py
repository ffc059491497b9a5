"""The running services that watch over ranks: a rank's client, the hub of a world, the relay of a node, the sidecar.

What they say is in `protocol`, what they conclude in `diagnosis`. Standard library only, so that a launching parent and
a sidecar never import torch.
"""
