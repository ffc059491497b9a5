"""Where the loop's batches come from: passes over the data, one after another, agreed with the other ranks or not.

Contract: the loop owns one `Passes` per run and takes batches from its `feed`: the data's own iterator in a world of
one, so that nothing stands between, or an `AgreedBatches`. The loop says when an epoch begins and ends, when the feed
is exhausted (`refill`) and when a window is (`finish_window`); the supply opens passes, begins the next when one ends,
learns the epoch's length, and hands what the ranks agreed to do to the engine. What can go wrong: data that gives
nothing (`DataError`), or that cannot be begun again (one warning, and the run ends: `is_dry`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from allstep.coordination import Request
from allstep.engine.agreed_batches import AgreedBatches
from allstep.engine.events import EventEnum, Events
from allstep.engine.handshake import Handshake
from allstep.engine.position import PositionHistory, keeper_of
from allstep.engine.prefetch import make_reader
from allstep.engine.run_plan import length_of
from allstep.engine.source import END, Source, place_in_data
from allstep.errors import DataError

if TYPE_CHECKING:
    from allstep.engine.engine import Engine


class Passes:
    """Batches of one run.

    `continues` says that the state is not at a pass's beginning, so that the first pass is opened where it stands;
    `opens_at` is the batch with which data opens that was brought there already.
    `takes_batches` says that a pass is open, so that ranks that agree have to vote before other data is taken.
    """

    def __init__(
        self,
        engine: Engine,
        meeting: Handshake | None,
        *,
        continues: bool,
        opens_at: int | None = None,
        announce: Callable[[EventEnum], None],
        iterate: Callable[[Any], Iterator[Any]] = iter,
    ) -> None:
        self.engine = engine
        self.state = engine.state
        self.agreed: AgreedBatches | None = None
        if meeting is not None:
            self.agreed = AgreedBatches(engine.coordinator, meeting.agreement, engine.state, engine.requests)
        self.feed: Any = None
        self.is_dry = False
        self.takes_batches = False
        self._announce = announce
        self._meeting = meeting
        self._continues = continues
        self._opens_at = opens_at
        self._pass_began_at = 0
        self._iterate = iterate
        self._trail: PositionHistory | None = None
        self._trail_began_at = 0
        self._source = Source(engine.state.dataloader, iterate)
        self._replaced = False
        self._unused, engine.kept = engine.kept, []

    def set_epoch(self, epoch: int) -> None:
        """Tell the data that epoch `epoch`, counted from 0, begins."""
        self._source.set_epoch(epoch)

    def next_stop(self) -> float:
        """The iteration at which the epoch, the run or the present window ends, infinity while unknown."""
        state = self.state
        ends_at = math.inf
        if state.epoch_length is not None:
            ends_at = self.engine.progress.epoch_began_at + state.epoch_length
        if state.max_iters is not None:
            ends_at = min(ends_at, state.max_iters)
        if self.agreed is not None:
            self.agreed.limit = ends_at
            if self.feed is not None:
                ends_at = min(ends_at, self.agreed.window_ends_at)
        return ends_at

    def confirm_end(self) -> None:
        """Check that all ranks end the run here, and take what the end means from requests of the last window.

        Raises DivergenceError.
        """
        if self.agreed is not None:
            self.agreed.confirm_end()
            for asked in self.agreed.take_landed():
                if asked.request is Request.TERMINATE:
                    self.engine.note_end(asked)

    def replace_data(self, data: Any) -> None:
        """Take batches from `data` from the next one on."""
        self._continues, self._opens_at, self._trail = False, None, None
        self._source, self.feed, self.takes_batches, self._unused = Source(data, self._iterate), None, False, []
        if self.engine.progress.epoch_is_open:
            self._source.set_epoch(self.state.epoch - 1)
            if self.agreed is None:
                self._open()

    def open_or_go_on(self) -> None:
        """Have batches to take, of a new pass or of the one that the last epoch left."""
        self.next_stop()
        if self._replaced:
            self._reopen()
        elif self.feed is None:
            self._open()
        elif self.agreed is not None:
            self.agreed.advance()
            self._land()

    def _open(self, *, is_new: bool = True) -> None:
        """Begin taking batches: where the state says, the first time in a continued run, else at a pass's beginning."""
        state, progress, skip = self.state, self.engine.progress, 0
        present = begun_in = state.epoch - progress.epoch_is_open
        opens_at, self._opens_at = self._opens_at, None
        if self._continues and opens_at is None:
            length = length_of(self._source.data) if self._meeting is None else self._meeting.length
            begun_in, skip = place_in_data(
                state.iteration, progress.epoch_began_at, state.epoch_length, present, length
            )
        self._continues = False
        if begun_in != present:
            self._source.set_epoch(begun_in)
        if self._unused:
            self._source.put_back(self._unused)
            self._unused = []
        self._source.open(skip, may_end=self.agreed is not None)
        if begun_in != present:  # the pass after this one, if it begins in this epoch, is of this epoch
            self._source.set_epoch(present)
        self._begin_pass(skip if opens_at is None else opens_at, is_new=is_new)
        if opens_at is not None:
            self._pass_began_at -= 1  # it may be at the data's end, and another pass begins then

    def _begin_pass(self, position: int = 0, *, is_new: bool = True) -> None:
        source = self._source
        assert source.batches is not None
        self.takes_batches = True
        if is_new:
            self._pass_began_at = self._taken()
        batches, keeper = source.batches, keeper_of(source.data)
        self._trail, self._trail_began_at = None, self.state.iteration
        if keeper is not None:
            batches = self._trail = PositionHistory(batches, keeper, self._done_in_pass)
        if self.agreed is None:
            self.feed = batches
        else:
            self.feed = self.agreed
            self.agreed.open_pass(make_reader(source.data, batches, position, self.engine.samples_in))
            self._land()

    def own_state(self, iteration: int) -> Any:
        """The data's own state behind the first `iteration` iterations of the run; END where it has none."""
        if self._trail is None:
            return END
        is_inside = self.engine.progress.epoch_is_open
        if self.agreed is not None and self.agreed.pass_has_ended and not is_inside:
            return self._trail.last()
        done = self._done_in_pass(iteration)
        return END if done is None else self._trail.behind(done, sees_end=not is_inside)

    def _done_in_pass(self, iteration: int | None = None) -> int | None:
        by = self.state.iteration if iteration is None else iteration
        return by - self._trail_began_at if self.agreed is None else self.agreed.taken_by(by)

    def _restart(self) -> None:
        ended = self._source
        self.takes_batches = False
        if self.agreed is not None:
            unused = self.agreed.end_pass(loses_unread=not ended.is_one_shot)
            if ended.is_one_shot:
                self._unused = unused
        self._announce(Events.DATALOADER_STOP_ITERATION)
        if self._unused:
            self._source.put_back(self._unused)
            self._unused = []
        if self._source is ended or self.feed is None:
            self._source.open()
        self._begin_pass()

    def _taken(self) -> int:
        return self.state.iteration + (self.agreed.waiting if self.agreed is not None else 0)

    def refill(self) -> bool:
        """The pass ended: begin the next, or learn the epoch's length. True when this epoch has more batches."""
        state = self.state
        if self.is_dry:
            return False
        if self._taken() == 0:
            raise DataError(
                f"data is empty{self._who_is_empty()}: it gave no batch; give at least one{self._or_longest()}"
            )
        if state.epoch_length is None:
            state.epoch_length = self._taken() - self.engine.progress.epoch_began_at
        elif self._taken() > self._pass_began_at:
            self._restart()
            self.next_stop()
            return True
        else:
            self._say_dry()
        self.next_stop()
        return False

    def has_another_epoch(self) -> bool:
        """Whether a one-shot iterator has anything left, asked before an epoch begins so that none is empty."""
        self._source.set_epoch(self.state.epoch)  # another rank's data may begin its pass here
        self.open_or_go_on()
        gives = True
        while gives and not self._has_more():
            self._restart()
            if Request.TERMINATE in self.engine.asked:
                return False
            gives = self._has_more() or self._taken() > self._pass_began_at  # these wait for the rest of their group
        if not gives:
            self._say_dry()
            return False
        if self.agreed is None:
            self._begin_pass()
        return True

    def _has_more(self) -> bool:
        return self._source.has_more() if self.agreed is None else self.agreed.has_more()

    @property
    def is_one_shot(self) -> bool:
        """Whether some rank's data is an iterator, so that it may have nothing left for another epoch."""
        return self._source.is_one_shot if self._meeting is None else self._meeting.is_one_shot

    def abandon_pass(self) -> None:
        """Begin the next epoch with a new pass; what a one-shot iterator gave is given again."""
        self.feed, self.takes_batches, self._replaced = None, False, False
        if self.agreed is not None:
            unused = self.agreed.abandon_pass()
            if self._source.is_one_shot:
                self._unused += unused

    def keep_unused(self) -> None:
        """Keep what was read ahead of a one-shot iterator for the engine's next run over it."""
        if self.agreed is not None and self._source.is_one_shot:
            progress = self.engine.progress
            undone = progress.steps_in_group > 0 or (progress.step_is_open and self.engine.group_size > 1)
            kept = self._unused if self.feed is None else self.agreed.abandon_pass(group_is_undone=undone)
            self.engine.kept = kept

    def finish_window(self) -> None:
        """Go on to the next window, if the present one has ended."""
        if self.agreed is not None and self.state.iteration >= self.agreed.window_ends_at:
            self.agreed.advance()
            self._land()

    def report_unread(self) -> None:
        """Say what ranks left unread in the epoch that has ended."""
        agreed, state = self.agreed, self.state
        if agreed is None:
            return
        state.unread = agreed.report_unread()
        if state.unread and self.engine.coordinator.rank == 0:
            left = ", ".join(f"rank {u.rank}: {u.batches} batches, {u.samples} samples" for u in state.unread)
            self.engine.logger.warning(
                "epoch %d ended when a rank ran out of data; unread, as far as known: %s", state.epoch, left
            )
        self._land(reopens=False)

    def close_epoch(self) -> None:
        """Hold the vote of an epoch's end."""
        if self.agreed is not None:
            self.agreed.close_epoch()
            self._land(reopens=False)

    def _land(self, *, reopens: bool = True) -> None:
        """Take what the ranks agreed to do."""
        agreed = self.agreed
        assert agreed is not None
        landed = agreed.take_landed()
        for asked in landed:
            self.engine.take(asked)
        if any(asked.request is Request.REPLACE_DATA for asked in landed):
            self._replaced = True
        if self._replaced and reopens and not self.engine.asked & {Request.TERMINATE, Request.TERMINATE_EPOCH}:
            self._reopen()

    def _reopen(self) -> None:
        """Vote anew on the coming iterations, since some rank's data was replaced: for the others the pass goes on."""
        assert self.agreed is not None
        self._replaced = False
        self.next_stop()
        if self.feed is None:
            self._open(is_new=False)
        else:
            self.agreed.open_pass()
            self._land()

    def _who_is_empty(self) -> str:
        if self.agreed is None or self.engine.coordinator.world_size == 1:
            return ""
        empty = [str(rank) for rank, n in enumerate(self.engine.coordinator.gather(self.agreed.total())) if n == 0]
        return f" on rank {', '.join(empty)}"

    def _or_longest(self) -> str:
        if self.agreed is None or self.engine.coordinator.world_size == 1:
            return ""
        return ", or train with uneven='longest', in which a rank without data takes part at weight zero"

    def _say_dry(self) -> None:
        state = self.state
        total = state.max_iters
        if total is None and state.epoch_length is not None and state.max_epochs is not None:
            total = state.epoch_length * state.max_epochs
        self.is_dry = True
        warnings.warn(
            f"the data ran dry: {self._taken()} of {total} iterations were done; give data that can be iterated again, "
            "or new data with engine.set_data() in a handler of DATALOADER_STOP_ITERATION",
            stacklevel=2,
        )
