"""What to say of an optimizer that raises in its step over parameters in parts.

Contract: a pure function of an exception and its traceback. torch's own error names an operation of DTensors, and not
the optimizer that called it.
"""

from __future__ import annotations

from traceback import walk_tb

import torch

from allstep.parallel.dtensor import is_dtensor


def optimizer_hint(error: BaseException) -> str | None:
    """A sentence for an exception that came out of an optimizer's step over DTensors; None for any other."""
    for frame, _ in walk_tb(error.__traceback__):
        stepping = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if not isinstance(stepping, torch.optim.Optimizer):
            continue
        parameters = [each for group in stepping.param_groups for each in group["params"]]
        in_parts = sum(map(is_dtensor, parameters))
        if not in_parts:
            return None
        name = type(stepping).__name__
        if in_parts < len(parameters):
            return (
                f"{name} was stepping parameters in parts (DTensors) and whole ones together; give it those in a group "
                "of their own, or foreach=False"
            )
        return (
            f"{name} was stepping parameters in parts (DTensors), which not every optimizer can; of torch's, AdamW, "
            "SGD and others can, as docs/howto/meshes.md lists"
        )
    return None
