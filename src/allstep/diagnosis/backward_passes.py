"""Why ranks have made different numbers of backward passes: pure functions.

DDP reduces gradients in each backward pass, and knows the passes of the ranks by their order alone. Where one rank
makes a pass less, its next one is taken for the one it left out: gradients of different iterations mix, and at last a
rank waits for one that does not come. What ranks know of their own passes tells the two usual reasons apart.
"""

from __future__ import annotations

from collections.abc import Mapping

from allstep.protocol.registration import spans

_SKIP = (
    "A step that leaves out a batch on one rank must call state.skip() and go on to its backward pass, so that this "
    "rank takes part at weight zero"
)
_CLOSURE = (
    "Where the loss decides how many passes there are, as in the closure of torch.optim.LBFGS, return the loss reduced "
    "over ranks, world.all_reduce(loss, 'mean'), so that all ranks decide alike"
)


def explain_passes(left_out: Mapping[int, int], most_passes: Mapping[int, int]) -> str:
    """What to say of ranks whose numbers of backward passes differ; empty where nothing is known of a reason.

    Args:
        left_out: by rank, the last iteration whose forward pass had no backward pass; 0 where each had one.
        most_passes: by rank, the most backward passes of a module in one iteration.
    """
    if len(set(left_out.values())) > 1:
        said = "; ".join(
            f"{_ranks(rank for rank, at in left_out.items() if at == iteration)} made no backward pass in iteration "
            f"{iteration}"
            for iteration in sorted({each for each in left_out.values() if each})
        )
        return f"{said}, and the others did. {_SKIP}"
    most = max(most_passes.values(), default=0)
    if most > 1:
        return f"an iteration has up to {most} backward passes. {_CLOSURE}"
    return ""


def advise_passes(left_out: Mapping[int, int], most_passes: Mapping[int, int]) -> str:
    """`explain_passes`, or what may be the reason where nothing is known."""
    return explain_passes(left_out, most_passes) or f"{_SKIP}. {_CLOSURE}"


def _ranks(ranks: object) -> str:
    found = list(ranks)  # type: ignore[call-overload]
    return f"rank{'s' if len(found) > 1 else ''} {spans(found)}"
