"""`Run`: the one mutable record of an engine's run.

Contract: an `Engine` has one `Run` for as long as it lives. The loop, passes over the data, agreement, resuming and
`engine.extension` are handed this record, read it and write their part of it. None of them knows the engine. What
users may see of it is `State`, which the run owns.

What is written by whom: the loop counts and says where an epoch and a step stand. A request (`control`) waits in
`requests` until it is voted on, or holds at once in `holding`; the loop acts on what holds. Agreement notes where its
window ends. `resume` moves the counters between runs. Nothing here decides, crosses ranks or can fail.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from allstep.coordination import Alone, Coordinator, Request, RequestKind, Uneven
from allstep.data.compositions import is_one_shot
from allstep.engine.batch_sizes import BatchCounter
from allstep.engine.events import Events
from allstep.engine.rank_sums import RankSum
from allstep.engine.replicas import Replicas
from allstep.engine.run_plan import RunTerms, StepSettings
from allstep.engine.source import END
from allstep.engine.state import State
from allstep.parallel import is_fully_sharded

LOOK_NOW = -1.0
"""What `Run.until` is when the loop has to look at requests after the present iteration."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an engine's ranks agree during a run; the same on all ranks.

    Attributes:
        policy: what ends a pass over uneven data.
        group_size: iterations in an accumulation group.
        widest_window: groups in a window at the most, whatever may be read ahead.
        lookahead: batches that may be read ahead to begin with; None where nothing needs to be read to be counted.
        doublings: how many times `lookahead` may be doubled while the batches that ranks hold take few bytes.
        needs_fillers: whether a rank without a batch runs the step.
    """

    policy: Uneven
    group_size: int
    widest_window: int
    lookahead: int | None
    doublings: int
    needs_fillers: bool

    def longest_window(self, doublings: int) -> int:
        """Groups in a window at the most, when the lookahead has been doubled so often.

        Two windows are held at a time, so one is at most half of what may be read ahead. With 0 there is no room for
        two, and a vote on one group is held just before it.
        """
        if self.lookahead is None:
            return self.widest_window
        return min(self.widest_window, (self.lookahead << doublings) // (2 * self.group_size))

    @property
    def is_synchronous(self) -> bool:
        """Whether each group is voted on just before it, so that a request holds after the present one."""
        return self.widest_window == 1


@dataclass(frozen=True, slots=True)
class Handshake:
    """What the ranks agreed at a run's start.

    Attributes:
        agreement: how they agree from then on.
        length: batches in a pass of all ranks, as far as their data says; None when a rank does not know.
        exact_length: the same where it is sure for every rank, so that nobody reads to the end to find it.
        is_one_shot: whether some rank's data is an iterator.
    """

    agreement: Agreement
    length: int | None
    exact_length: int | None
    is_one_shot: bool


@dataclass(frozen=True, slots=True)
class UnfinishedEvent:
    """An event some of whose handlers were not called, because one of them raised; a run that goes on calls them first.

    Attributes:
        event: ITERATION_COMPLETED or EPOCH_COMPLETED, whose iteration or epoch is done all the same.
        epoch_began_at: iterations that were done when the epoch began.
        is_cut: the epoch was ended before its length.
    """

    event: Events
    epoch_began_at: int
    is_cut: bool = False


@dataclass(slots=True, weakref_slot=True)
class Run:
    """Where a run stands, what it was asked, and what it goes on with.

    Attributes:
        settings: what the engine was made with.
        state: the counters and results that users see.
        epoch_began_at: iterations that were done when the present epoch began.
        shown_length: what the engine put into `state.epoch_length` by itself; END where somebody gave it.
        own_lengths: batches in a pass of this rank's data when that was last agreed: for sure, and as it says.
        pass_length: batches in the present pass of all ranks; None where only reading to its end tells.
        replaced_in_epoch: data was replaced inside the present epoch, whose length stays.
        keeps_length: later epochs have that length as well, whatever the new data has.
        epoch_is_open: epoch `state.epoch` has begun and not ended.
        step_is_open: iteration `state.iteration` is counted and its step has not returned.
        steps_in_group: steps done of an accumulation group that is not complete. Its gradients are lost when the run
            ends here, so that the group is begun again.
        passes_began_at: iterations that were done when the first of the passes began that follow on each other without
            a break. 0 unless an epoch was cut short.
        unfinished: the event whose handlers an exception has left; None without.
        redone_until: iterations up to this one were begun before, and are done again because their accumulation group
            was not completed.
        has_failed: an exception ended the last run.

        requests: what was asked for on this rank and not voted on yet.
        holding: what holds now, and the loop has not acted on yet.
        skips_completed: whether COMPLETED is left out after the end that was asked for.
        skips_epoch_completed: the same of EPOCH_COMPLETED.
        proposed_data: data given to `set_data` on this rank that is still to be voted on; END without.
        new_data: data that replaces what is being run over, as soon as a batch is wanted; END without.
        needs_new_vote: some rank's data was replaced, so that the coming iterations are to be voted on anew.
        leaving: what `Engine.run` raises at the run's end, in place of returning.
        survives: `exception -> whether the run goes on`, asked after EXCEPTION_RAISED where nobody votes; or None.
        failing: why the run has failed, as this rank has asked for, from before the others know.
        notice: what a signal has left for the loop to ask for, after the present iteration; see `cancellation`.

        is_running: `Engine.run` is under way.
        is_nested: it is inside of another engine's, in whose step or handler it was called.
        drive: the loop, while a run is under way or suspended.
        until: the iteration after which the loop has more to decide than which handlers are due.
        window_ends_at: the iteration at which the present agreed window ends.
        window_began_at: iterations that were done when it began.
        group_totals: samples of all ranks in each of its accumulation groups.
        pass_is_open: batches are being taken, so that ranks that agree have to vote before other data is taken.
        kept: what was read ahead of a one-shot iterator and not used, for the next run over it.

        counts_samples: somebody weighs by `state.samples`, so that batches are counted also where nobody votes.
        counter: what counts them there.
        pass_offset: there the number, in its pass, of the batch of the run's first iteration; negative in later passes.

        modules: wrapped modules whose gradients the step's backward passes reduce.
        replicas: what ranks say of them; None where there is one rank.
        skipped: the present iteration's batch, where `state.skip()` was called; None without.
        sums: numbers that handlers want summed over the ranks.
        end_step: tells a device that collects work, such as XLA, to begin with it; None elsewhere.

        coordinator: how the ranks of this run agree.
        handshake: what they agreed at its start; None where there is nothing to agree on.
        logger: where the run reports.

        was_loaded: the state was loaded, and no run has gone on from it yet.
        loaded_place: the place in the data that was loaded.
        data_state: the data's own state where the last run was left; END where it has none.
    """

    settings: StepSettings
    state: State = field(default_factory=State)
    epoch_began_at: int = 0
    shown_length: Any = END
    own_lengths: tuple[int | None, int | None] = (None, None)
    pass_length: int | None = None
    replaced_in_epoch: bool = False
    keeps_length: bool = False
    epoch_is_open: bool = False
    step_is_open: bool = False
    steps_in_group: int = 0
    passes_began_at: int = 0
    unfinished: UnfinishedEvent | None = None
    redone_until: int = 0
    has_failed: bool = False

    requests: list[Request] = field(default_factory=list)
    holding: set[RequestKind] = field(default_factory=set)
    skips_completed: bool = False
    skips_epoch_completed: bool = False
    proposed_data: Any = END
    new_data: Any = END
    needs_new_vote: bool = False
    leaving: BaseException | None = None
    survives: Callable[[BaseException], bool] | None = None
    failing: str | None = None
    notice: str | None = None

    is_running: bool = False
    is_nested: bool = False
    drive: Generator[None, None, None] | None = None
    until: float = LOOK_NOW
    window_ends_at: int = 0
    window_began_at: int = 0
    group_totals: tuple[int, ...] = ()
    pass_is_open: bool = False
    kept: list[Any] = field(default_factory=list)

    counts_samples: bool = False
    counter: BatchCounter | None = None
    pass_offset: int = 0

    modules: list[nn.Module] = field(default_factory=list)
    replicas: Replicas | None = None
    skipped: Any = None
    sums: list[RankSum] = field(default_factory=list)
    end_step: Callable[[], None] | None = None

    coordinator: Coordinator = field(default_factory=Alone)
    handshake: Handshake | None = None
    logger: logging.Logger = field(default_factory=lambda: logging.getLogger("allstep.engine"))

    was_loaded: bool = False
    loaded_place: Mapping[str, Any] | None = None
    data_state: Any = END

    @property
    def is_under_way(self) -> bool:
        """Whether there is a run that has begun and not ended; it may be suspended."""
        return self.drive is not None

    @property
    def votes(self) -> bool:
        """Whether a request has to be agreed before it holds."""
        return self.drive is not None and self.handshake is not None

    @property
    def skips_idle(self) -> bool:
        """Whether a rank without a batch leaves the step out; not where its forward pass is what others wait for."""
        return self.settings.idle == "skip" and not any(map(is_fully_sharded, self.modules))

    @property
    def steps_done(self) -> int:
        """Iterations whose steps count: completed, up to the end of the last whole accumulation group."""
        return self.state.iteration - self.step_is_open - self.steps_in_group

    @property
    def epochs_completed(self) -> int:
        """Epochs that have ended, not counting one that is open."""
        return self.state.epoch - self.epoch_is_open

    @property
    def epochs_to_save(self) -> tuple[int, int]:
        """Epochs that have ended, and iterations done before the next, as a saved state says it.

        An epoch whose end has not been told to all its handlers is one that still has to end.
        """
        left = self.unfinished
        if left is None or left.event is not Events.EPOCH_COMPLETED or left.is_cut:
            return self.epochs_completed, self.epoch_began_at
        return self.epochs_completed - 1, left.epoch_began_at

    @property
    def epoch_is_pass(self) -> bool:
        """Whether an epoch is one pass over the data, since nobody gave an epoch's length."""
        return self.shown_length is not END and bool(self.state.epoch_length == self.shown_length)

    @property
    def epoch_is_counted(self) -> bool:
        """Whether the epoch ends after a number of iterations, also where a pass over the data ends before."""
        return not self.epoch_is_pass or (self.replaced_in_epoch and self.pass_length is not None)

    @property
    def epoch_ends_at(self) -> float:
        """The iteration at which the epoch ends; infinity where the end of its data decides."""
        length = self.pass_length if self.epoch_is_pass else self.state.epoch_length
        return math.inf if length is None else self.epoch_began_at + length

    @property
    def ends_at(self) -> float:
        """The iteration at which the epoch, or the run, ends; infinity while unknown."""
        most = self.state.max_iters
        return min(self.epoch_ends_at, math.inf if most is None else most)

    def has_read(self, data: Any) -> bool:
        """Whether data is an iterator that was run over before: it stands behind what it gave, nothing is skipped."""
        return is_one_shot(data) and data is self.state.dataloader

    def take_terms(self, terms: RunTerms) -> None:
        """Go by what was settled for the run that begins or goes on."""
        state = self.state
        state.epoch_length, state.max_epochs, state.max_iters = terms.epoch_length, terms.max_epochs, terms.max_iters
        self.shown_length = terms.epoch_length if terms.epoch_is_pass else END

    def note_replacement(self) -> None:
        """Data of some rank is replaced: inside an epoch that has begun the epoch's length stays."""
        self.replaced_in_epoch = self.epoch_is_open and self.state.iteration > self.epoch_began_at
        if self.keeps_length and self.state.epoch_length is not None:
            self.shown_length = END  # as if somebody had given it

    def show_length(self, length: int | None) -> None:
        """Say in the state how many iterations an epoch has, unless somebody gave that number."""
        if self.epoch_is_pass:
            self.state.epoch_length = self.shown_length = length

    def count_batch(self, batch: Any) -> int:
        """Samples in the batch of the present iteration, where nobody votes."""
        counter = self.counter or BatchCounter(self.state.dataloader, self.settings.samples_in)
        return counter(batch, self.state.iteration - 1 + self.pass_offset)

    def take_requests(self) -> tuple[Request, ...]:
        """What was asked for on this rank since the last vote, to be said in the coming one."""
        # Copied first and then removed by count: a signal's handler may add to the list between any two instructions.
        taken = tuple(self.requests)
        del self.requests[: len(taken)]
        return taken

    def forget_requests(self) -> None:
        """Begin with nothing asked for."""
        self.requests.clear()
        self.holding.clear()
        self.skips_completed = self.skips_epoch_completed = self.needs_new_vote = False
        self.proposed_data = self.new_data = END
        self.leaving = self.failing = None

    def forget_progress(self) -> None:
        """Begin with all counters at zero."""
        self.state.iteration = self.state.epoch = self.epoch_began_at = self.steps_in_group = self.passes_began_at = 0
        self.state.inner_iterations = 0
        self.epoch_is_open = self.step_is_open = self.has_failed = False
        self.unfinished, self.redone_until = None, 0
