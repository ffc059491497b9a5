"""`Profiler`: torch's profiler for some iterations on some ranks, one trace file a rank.

Contract: attached on every rank alike; ranks that were not chosen do nothing. The profiler begins a few iterations
before the chosen ones, since what it does first is slow and would be in the trace, and writes its file after the last
of them. A run that ends before, by an exception too, leaves the file of what it had. Other iterations cost nothing. A
run that goes on behind the first of the chosen iterations is not profiled. What can go wrong: the folder cannot be
written, which ends the run as an exception of any handler.

A trace opens in a browser at ui.perfetto.dev, or in chrome://tracing.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

from allstep.engine import Engine, Events
from allstep.errors import ArgumentError


class Profiler:
    """Profiles iterations.

    Args:
        folder: where trace files go, `rank_R_iterations_A-B.json.gz`; made if it is not there.
        iterations: which, counted over the whole run and from 1, as `range(10, 13)`.
        ranks: on which ranks, or "all".
        warm_up: iterations before the chosen ones in which the profiler runs already, as far as there are any.
        memory: note what is allocated and freed.
        shapes: note the shapes of operators' inputs.
        stacks: note the lines of Python that called operators.

    Attributes:
        path: this rank's trace, once it is written; None before.

    Raises:
        ArgumentError: iterations is no range of numbers from 1 on with step 1, or warm_up is negative.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        iterations: range = range(10, 13),
        *,
        ranks: Collection[int] | Literal["all"] = (0,),
        warm_up: int = 2,
        memory: bool = False,
        shapes: bool = False,
        stacks: bool = False,
    ) -> None:
        if iterations.step != 1 or iterations.start < 1 or not iterations:
            raise ArgumentError(f"iterations is {iterations!r}; it must be a range from 1 or later, as range(10, 13)")
        if warm_up < 0:
            raise ArgumentError(f"warm_up is {warm_up!r}; it must be 0 or more")
        self.folder = Path(folder)
        self.iterations = iterations
        self.ranks = ranks
        self.warm_up = min(warm_up, iterations.start - 1)
        self.memory = memory
        self.shapes = shapes
        self.stacks = stacks
        self.path: Path | None = None
        self._profile: profile | None = None

    def attach(self, engine: Engine) -> Profiler:
        """Profile in the runs of `engine`. Returns self."""
        first, last = self.iterations.start - self.warm_up, self.iterations[-1]
        engine.add_event_handler(Events.ITERATION_STARTED(once=first), self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED(after=first - 1, before=last + 1), self._step)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE | Events.EXCEPTION_RAISED, self._end)
        return self

    def _begin(self, engine: Engine) -> None:
        if self.ranks != "all" and engine.coordinator.rank not in self.ranks:
            return
        self._end()
        self.folder.mkdir(parents=True, exist_ok=True)
        first, last = self.iterations.start, self.iterations[-1]
        path = self.folder / f"rank_{engine.coordinator.rank}_iterations_{first}-{last}.json.gz"

        def write(done: profile) -> None:
            done.export_chrome_trace(str(path))
            self.path = path

        self._profile = profile(
            activities=supported_activities()  # type: ignore[no-untyped-call]
            & {ProfilerActivity.CPU, ProfilerActivity.CUDA, ProfilerActivity.XPU},
            schedule=schedule(wait=0, warmup=self.warm_up, active=len(self.iterations), repeat=1),
            on_trace_ready=write,
            profile_memory=self.memory,
            record_shapes=self.shapes,
            with_stack=self.stacks,
        )
        self._profile.start()

    def _step(self, engine: Engine) -> None:
        if self._profile is None:
            return
        self._profile.step()
        if engine.state.iteration == self.iterations[-1]:
            self._end()

    def _end(self, *_: Any) -> None:
        # Inside the chosen iterations this writes what there is.
        if self._profile is not None:
            running, self._profile = self._profile, None
            running.stop()
