"""DDP that says when it waits for the other ranks, so that a step's own time can be told from its waiting.

Contract: `wrap_module` makes one in place of a plain `Replica` where a service is told and the host waits. That is on
the CPU, where gloo's reductions end inside `backward`. What is measured there is the time from the moment that this
rank has all of its own gradients until all reductions have ended ("gradients"), and the time in which DDP synchronises
buffers and buckets before a forward pass ("buffers"). Reductions that ran beside the backward pass cost no waiting. On
CUDA the host only queues kernels and waits at whatever reads a result, so nothing is measured.

How: a hook on the outputs queues a callback of the autograd engine when the backward pass begins. The engine calls such
callbacks in order when all gradients are there. DDP queues the one that waits for its reductions later, when its last
bucket is ready. So ours is called first, and one that it queues in turn is called after DDP's. Under torch.compile both
are left out of what is compiled, and the module inside is compiled whole.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from allstep.parallel.replica import Replica
from allstep.parallel.torch_private import BracketedDDP, queue_backward_callback


class TimedDDP(Replica, BracketedDDP):
    """A replica that tells `activity` when it waits. A copy, pickled or not, has none and measures nothing."""

    def before_forward(self) -> AbstractContextManager[None]:
        """The wait in which DDP synchronises buffers and buckets."""
        return nullcontext() if self.activity is None else self.activity.wait("buffers")

    def gradients_are_there(self) -> None:
        """The wait for all reductions begins."""
        super().gradients_are_there()
        activity = self.activity
        if activity is not None and not activity.waiting:  # else another forward pass of this backward has said so
            activity.wait_began("gradients")
            queue_backward_callback(activity.wait_ended)
