"""What a run is asked to do while it is under way: end, end the epoch, be suspended, take other data.

Contract: a step, a handler or a signal asks through `Engine`. Where nobody has to agree, the request holds at once and
the loop acts on it after the present event or step. Where ranks vote, it waits in `Run.requests` for the next vote, and
`land` makes it hold on all of them when that vote has been read. Outside a run a request changes nothing.
"""

from __future__ import annotations

from typing import Any

from allstep.coordination import OUTCOMES, Outcome, Request, RequestKind
from allstep.engine.run import LOOK_NOW, Run
from allstep.engine.source import END


def ask(
    run: Run,
    kind: RequestKind,
    reason: str | None,
    *,
    skip: bool = False,
    agreed: bool = False,
    outcome: Outcome = "left",
) -> None:
    """Put a request of this rank to the next vote, or let it hold at once where nobody votes or all ranks agree."""
    if not run.is_under_way:
        return
    why = reason or f"{kind.value}() at iteration {run.state.iteration}"
    request = Request(kind, run.coordinator.rank, why, skip, outcome)
    if kind is RequestKind.TERMINATE and outcome == "failed":
        run.failing = run.failing or why
    if run.votes and not agreed:
        run.requests.append(request)
    else:
        land(run, request)


def take_notice(run: Run) -> None:
    """Ask for the run's end where a signal has left a notice."""
    if run.notice is not None:
        reason, run.notice = run.notice, None
        ask(run, RequestKind.TERMINATE, reason, outcome="cancelled")


def propose_data(run: Run, data: Any) -> None:
    """Have batches come from `data`: from the next one on, or inside a pass of ranks that vote when they have voted."""
    if run.votes and run.pass_is_open:
        run.proposed_data = data
        ask(run, RequestKind.REPLACE_DATA, None)
        return
    run.state.dataloader = data
    if not run.is_under_way:
        return
    run.new_data = data
    if not run.votes:
        run.holding.add(RequestKind.REPLACE_DATA)
        run.until = LOOK_NOW


def land(run: Run, request: Request) -> None:
    """Let a request hold, which all ranks have agreed where they vote."""
    if request.kind is RequestKind.REPLACE_DATA:
        run.needs_new_vote = True  # on every rank: the iterations that were agreed counted the old data
        run.note_replacement()
        if request.rank == run.coordinator.rank and run.proposed_data is not END:
            run.state.dataloader = run.new_data = run.proposed_data
            run.proposed_data = END
        return
    if request.kind is RequestKind.TERMINATE:
        note_end(run, request)
    elif request.kind is RequestKind.TERMINATE_EPOCH:
        run.skips_epoch_completed = request.skip
    run.holding.add(request.kind)
    run.until = LOOK_NOW


def note_end(run: Run, request: Request) -> None:
    """Note what an end that was agreed means, also where the run had come to its own end before that was known."""
    state = run.state
    run.skips_completed = request.skip
    if state.outcome is None or OUTCOMES.index(request.outcome) > OUTCOMES.index(state.outcome):
        state.stop_reason, state.outcome = f"rank {request.rank}: {request.reason}", request.outcome
    run.holding.add(RequestKind.TERMINATE)
