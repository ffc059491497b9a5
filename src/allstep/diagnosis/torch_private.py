"""Names inside torch that show in a rank's stacks.

They are only compared with text: nothing here imports torch, since the launcher's process judges and has none. Where a
version of torch calls them otherwise, `stacks.waits_in` finds no wait in such a stack. The rank is then judged by what
its heartbeats say, as a rank without torch is, and nothing fails.
"""

from __future__ import annotations

BACKWARD_FRAME = "_engine_run_backward"
"""The innermost Python frame of a backward pass, in torch/autograd/graph.py since torch 2.3.

In it a rank waits for its peers' gradients, because DDP reduces them from hooks that the backward pass calls.
"""

LOGGING_FILE = "c10d_logger.py"
"""The file of the wrapper around each collective of torch.distributed, since torch 2.0.

Its frame is left out, so that the collective is named and not the wrapper. Where it is called otherwise, the name that
is shown is that of the frame furthest in, which is still the collective's.
"""
