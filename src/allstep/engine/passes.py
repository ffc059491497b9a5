"""Where the loop's batches come from: passes over the data, one after another, agreed with the other ranks or not.

Contract: `Engine.run` makes one `Passes` for a run and the loop takes batches from its `batches`. In a world of one
that is the data's own iterator, so that nothing stands between; otherwise `AgreedBatches`. The loop says when an epoch
begins and ends, when `batches` are exhausted (`end_pass`) and when a window is (`finish_window`). `Passes` opens each
pass, learns the epoch's length, and lets hold in the `Run` what the ranks agreed to do. What can go wrong: data that
gives nothing (`DataError`), or that cannot be begun again (one warning, and the run ends: `is_dry`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from allstep.coordination import RequestKind
from allstep.engine.agreed_batches import AgreedBatches
from allstep.engine.batch_sizes import BatchCounter
from allstep.engine.control import land, note_end
from allstep.engine.position import PositionHistory, stateful_of
from allstep.engine.prefetch import make_reader
from allstep.engine.rank_sums import land_sums, read_sums
from allstep.engine.run import Run
from allstep.engine.run_plan import length_of, lengths_of
from allstep.engine.source import END, Source, pass_position
from allstep.errors import DataError

_ENDS = {RequestKind.TERMINATE, RequestKind.TERMINATE_EPOCH}


class Passes:
    """Passes over the data of one run.

    Args:
        run: the record of the run; `state.dataloader` is the data.
        continues: the state is not at a pass's beginning, so that the first pass is opened where it stands.
        opens_at: the batch with which data opens that was brought there already.
        iterate: called in place of `iter` on the data.

    Attributes:
        batches: what the next batch is taken from; None between passes.
        is_dry: whether the data cannot give what was asked for, so that the run ends.
    """

    def __init__(
        self,
        run: Run,
        *,
        continues: bool,
        opens_at: int | None = None,
        iterate: Callable[[Any], Iterator[Any]] = iter,
    ) -> None:
        self.batches: Any = None
        self.is_dry = False
        self._run = run
        self._agreed = None if run.handshake is None else AgreedBatches(run)
        self._continues = continues
        self._opens_at = opens_at
        self._pass_began_at = 0
        self._given_before = 0
        self._iterate = iterate
        self._history: PositionHistory | None = None
        self._history_began_at = 0
        self._source = Source(run.state.dataloader, iterate)
        self._unused, run.kept = run.kept, []
        self._pass_is_over = self._said_longer = False
        run.pass_length = run.own_lengths[0] if run.handshake is None else run.handshake.exact_length
        run.replaced_in_epoch = False

    # Opening a pass

    def set_epoch(self, epoch: int) -> None:
        """Tell the data that epoch `epoch`, counted from 0, begins."""
        self._run.replaced_in_epoch = False
        self.take_new_data()
        self._source.set_epoch(epoch)

    def open_or_go_on(self) -> None:
        """Have batches to take, of a new pass or of the one that the last epoch left."""
        self.take_new_data()
        if self._run.needs_new_vote and self._pass_is_over:
            self._run.needs_new_vote = False
            self._open()  # on every rank: those whose data was not replaced begin another pass as well
        elif self._run.needs_new_vote:
            self._vote_anew()
        elif self.batches is None:
            self._open()
        elif self._agreed is not None and not self._pass_is_over:
            self._agreed.advance()
            self._let_hold()

    def take_new_data(self) -> None:
        """Go over to data that was given to `set_data`, if any was since the last call."""
        run = self._run
        if run.new_data is END:
            return
        data, run.new_data = run.new_data, END
        # Whether it was asked for here or has landed: it is done now.
        run.holding.discard(RequestKind.REPLACE_DATA)
        self._continues, self._opens_at, self._history = False, None, None
        self._source, self.batches, run.pass_is_open, self._unused = Source(data, self._iterate), None, False, []
        if self._agreed is None:
            run.note_replacement()
        if run.epoch_is_open:
            # Ranks that agree open it in their next vote, all of them together.
            self._source.set_epoch(run.state.epoch - 1)
            if self._agreed is None:
                self._open()

    def _open(self, *, is_new: bool = True) -> None:
        """Begin taking batches: where the state says, the first time in a continued run, else at a pass's beginning."""
        run, state, skip = self._run, self._run.state, 0
        present = begun_in = run.epochs_completed
        # Good for the first pass only: later ones begin at the beginning.
        opens_at, self._opens_at = self._opens_at, None
        if self._continues and opens_at is None:
            length = length_of(self._source.data) if run.handshake is None else run.handshake.length
            begun_in, skip = pass_position(
                state.iteration,
                run.epoch_began_at,
                state.epoch_length,
                present,
                None if run.epoch_is_pass else length,
                passes_began_at=run.passes_began_at,
            )
        self._continues = False
        if begun_in != present:
            self._source.set_epoch(begun_in)
        self._put_back_unused()
        self._source.open(skip, may_end=self._agreed is not None)
        if begun_in != present:  # the pass after this one, if it begins in this epoch, is of this epoch
            self._source.set_epoch(present)
        self._begin_pass(skip if opens_at is None else opens_at, is_new=is_new)
        if opens_at is not None:
            self._pass_began_at -= 1  # it may be at the data's end, and another pass begins then

    def _begin_pass(self, position: int = 0, *, is_new: bool = True) -> None:
        source, run = self._source, self._run
        assert source.batches is not None
        run.pass_is_open, self._pass_is_over = True, False
        other_length = self._note_lengths()
        # A pass that goes on with replaced data of some rank is the same one for all others.
        if is_new:
            self._pass_began_at = self._taken()
        self._given_before = source.given - run.state.iteration
        batches, stateful = source.batches, stateful_of(source.data)
        self._history, self._history_began_at = None, run.state.iteration
        if stateful is not None:
            batches = self._history = PositionHistory(batches, stateful, self._done_in_pass)
        if self._agreed is None:
            self.batches = batches
            run.counter = BatchCounter(source.data, run.settings.samples_in)
            run.pass_offset = position - run.state.iteration
        else:
            self.batches = self._agreed
            # A state of the data is kept for each batch that is read ahead, so it counts as a part of it.
            bytes_besides = (lambda: 0) if self._history is None else self._history.bytes_of_state
            reader = make_reader(source.data, batches, position, run.settings.samples_in, bytes_besides)
            self._agreed.open_pass(reader, is_one_shot=source.is_one_shot, other_length=other_length)
            self._let_hold()

    def _note_lengths(self) -> bool:
        """Note how long the data of an epoch that begins is; whether that is not what ranks have agreed."""
        run = self._run
        if run.state.iteration > run.epoch_began_at:  # the epoch's length stays
            return False
        before, run.own_lengths = run.own_lengths, lengths_of(self._source.data)
        if self._agreed is not None:
            return before != run.own_lengths
        run.pass_length = run.own_lengths[0]
        if run.own_lengths[1] is not None:
            run.show_length(run.own_lengths[1])
        return False

    def _put_back_unused(self) -> None:
        if self._unused:
            self._source.put_back(self._unused)
            self._unused = []

    # A pass's end

    def end_pass(self) -> bool:
        """`batches` are exhausted: learn the epoch's length, or leave the pass.

        True when the pass was left and this epoch goes on in another: `begin_next` is to follow.
        """
        run = self._run
        if self.is_dry:
            return False
        if self._taken() == 0:
            raise DataError(
                f"data is empty{self._who_is_empty()}: it gave no batch; give at least one{self._or_longest()}"
            )
        # Where an epoch is a pass, the end of the data is the end of the epoch.
        if not run.epoch_is_counted and self._taken() > run.epoch_began_at:
            run.show_length(self._taken() - run.epoch_began_at)
        # A pass that gave nothing would be begun again for ever.
        elif self._taken() > self._pass_began_at:
            self.leave_pass()
            return True
        else:
            self.say_dry()
        return False

    def leave_pass(self) -> None:
        """End the present pass; what was read ahead of a one-shot iterator is given again in the next."""
        self._run.pass_is_open = False
        if self._agreed is not None:
            # An iterator gives in its next pass what was read ahead in this one, so nothing of it is lost.
            unused = self._agreed.end_pass(loses_unread=not self._source.is_one_shot)
            if self._source.is_one_shot:
                self._unused = unused

    def begin_next(self) -> None:
        """Begin another pass, over other data if handlers of DATALOADER_STOP_ITERATION gave some."""
        ended = self._source
        self.take_new_data()
        self._put_back_unused()
        # New data that was given inside an epoch has been opened already.
        if self._source is ended or self.batches is None:
            self._source.open()
        self._begin_pass()

    def abandon_pass(self) -> None:
        """Begin the next epoch with a new pass; what a one-shot iterator gave is given again."""
        run = self._run
        self.batches, run.pass_is_open, run.needs_new_vote = None, False, False
        run.passes_began_at = run.state.iteration
        if self._agreed is not None:
            unused = self._agreed.abandon_pass()
            if self._source.is_one_shot:
                self._unused += unused

    # Before an epoch of a one-shot iterator

    @property
    def is_one_shot(self) -> bool:
        """Whether some rank's data is an iterator, so that it may have nothing left for another epoch."""
        self.take_new_data()
        handshake = self._run.handshake
        return self._source.is_one_shot if handshake is None else handshake.is_one_shot

    def look_for_another_epoch(self) -> None:
        """Have batches to take before it is known whether an epoch follows."""
        self.set_epoch(self._run.state.epoch)  # another rank's data may begin its pass here
        self.open_or_go_on()

    def has_more(self) -> bool:
        """Whether the pass has another batch. Without agreement that one is read now, and given next."""
        if self._agreed is not None:
            return self._agreed.has_more()
        has_more = self._source.has_more()
        self._begin_pass()  # what was read is in front of the source's batches now
        return has_more

    def has_waiting(self) -> bool:
        """Whether batches of the pass that has begun wait for the rest of their group."""
        return self._taken() > self._pass_began_at

    # Agreement

    def finish_window(self) -> None:
        """Go on to the next window, if the present one has ended."""
        self._notice_longer()
        if self._agreed is not None and self._run.state.iteration >= self._run.window_ends_at:
            self._agreed.advance()
            self._let_hold()

    def next_stop(self) -> float:
        """The iteration at which the epoch, the run or the present window ends, infinity while unknown."""
        run = self._run
        if self._agreed is not None and self.batches is not None:
            return min(run.ends_at, run.window_ends_at)
        return min(run.ends_at, self._longer_at())

    def report_unread(self) -> None:
        """Say what ranks left unread in the epoch that has ended, and make their buffers those of one model.

        What handlers want summed over ranks is told them here, for their part of the epoch's end.
        """
        agreed, run = self._agreed, self._run
        if agreed is None:
            land_sums(run.sums, read_sums(run.sums))
            return
        unread = run.state.unread = agreed.report_unread()
        if unread and run.coordinator.rank == 0:
            left = ", ".join(f"rank {u.rank}: {u.batches} batches, {u.samples} samples" for u in unread)
            run.logger.warning(
                "epoch %d ended when a rank ran out of data; unread, as far as known: %s", run.state.epoch, left
            )
        if run.replicas is not None:
            run.replicas.unify_buffers()
        self._let_hold(votes_anew=False)

    def close_epoch(self) -> None:
        """Hold the vote of an epoch's end."""
        if self._agreed is not None:
            self._agreed.close_epoch()
            self._let_hold(votes_anew=False)
        # The next epoch is another pass, whatever is left in this one or was added to its data meanwhile.
        if self._run.epoch_is_pass and not self.is_one_shot:
            self._pass_is_over = True
            if self._agreed is None and self.batches is not None:
                self.batches = iter(())

    def confirm_end(self) -> None:
        """Check that all ranks end the run here, and take what the end means from requests of the last window.

        Raises DivergenceError.
        """
        if self._agreed is not None:
            self._agreed.confirm_end()
            if self._run.replicas is not None:
                self._run.replicas.unify_buffers()
            for request in self._agreed.take_landed():
                if request.kind is RequestKind.TERMINATE:
                    note_end(self._run, request)

    def _let_hold(self, *, votes_anew: bool = True) -> None:
        """Let hold what the ranks agreed to do."""
        agreed, run = self._agreed, self._run
        assert agreed is not None
        for request in agreed.take_landed():
            land(run, request)
            self.take_new_data()
        if run.needs_new_vote and votes_anew and not run.holding & _ENDS:
            self._vote_anew()

    def _vote_anew(self) -> None:
        """Vote on the coming iterations, since some rank's data was replaced: for the others the pass goes on."""
        assert self._agreed is not None
        self._run.needs_new_vote = False
        if self.batches is None:
            self._open(is_new=False)
        else:
            self._agreed.open_pass()
            self._let_hold()

    # What is kept and saved

    def own_state(self, iteration: int) -> Any:
        """The data's own state behind the first `iteration` iterations of the run; END where it has none."""
        history, run = self._history, self._run
        if history is None or run.new_data is not END:
            return END
        # Between epochs a pass that has ended is over, so that the next run begins another one.
        if self._agreed is not None and self._agreed.pass_has_ended and not run.epoch_is_open:
            return history.last()
        done = self._done_in_pass(iteration)
        return END if done is None else history.behind(done, sees_end=not run.epoch_is_open)

    def keep_unused(self) -> None:
        """Keep what a one-shot iterator gave and no step has used, for the engine's next run over it."""
        run, source = self._run, self._source
        if not source.is_one_shot or run.new_data is not END:
            return
        if self._agreed is None:
            undone = source.given - self._given_before > run.steps_done
            run.kept = [*self._unused, *source.unused(last_is_undone=undone)]
        else:
            run.kept = (
                self._unused
                if self.batches is None
                else self._agreed.abandon_pass(group_is_undone=self._agreed.has_undone)
            )

    def _done_in_pass(self, iteration: int | None = None) -> int | None:
        by = self._run.state.iteration if iteration is None else iteration
        return by - self._history_began_at if self._agreed is None else self._agreed.taken_by(by)

    def _taken(self) -> int:
        """Iterations done, and those whose batches wait for the rest of their group."""
        return self._run.state.iteration + (0 if self._agreed is None else self._agreed.waiting)

    # What can go wrong

    def say_dry(self) -> None:
        """Warn that the data has ended for good, before what was asked for was done.

        Raises DataError where that is not an iterator's end, but a rank without a batch for this epoch.
        """
        where = self._where_dry()
        state = self._run.state
        total = state.max_iters
        if total is None and state.epoch_length is not None and state.max_epochs is not None:
            total = state.epoch_length * state.max_epochs
        self.is_dry = True
        warnings.warn(
            f"the data ran dry{where}: {self._taken()} of {total} iterations were done; give data that can be iterated "
            "again, or new data with engine.set_data() in a handler of DATALOADER_STOP_ITERATION",
            stacklevel=2,
        )

    def _where_dry(self) -> str:
        """On which ranks a pass gave nothing. Raises DataError where some of them do not have a spent iterator."""
        run = self._run
        if self._agreed is None or run.coordinator.world_size == 1:
            return ""
        said = run.coordinator.gather((self._agreed.total(), self._source.is_one_shot))
        empty = [str(rank) for rank, (batches, is_one_shot) in enumerate(said) if not batches and not is_one_shot]
        if empty and any(batches for batches, _ in said):
            raise DataError(
                f"data is empty on rank {', '.join(empty)} in epoch {run.state.epoch}, while other ranks have batches: "
                f"give every rank at least one batch in each epoch{self._or_longest()}"
            )
        dry = [str(rank) for rank, (batches, _) in enumerate(said) if not batches]
        return f" on rank {', '.join(dry)}"

    def _longer_at(self) -> float:
        """The iteration in which the data has certainly given more than its length; infinity without one."""
        run, told = self._run, self._run.own_lengths[1]
        if told is None or self._said_longer or not run.epoch_is_pass or run.pass_length is not None:
            return math.inf
        # Each worker of a DataLoader rounds its own part of an iterable dataset.
        return run.epoch_began_at + told + max(1, getattr(self._source.data, "num_workers", 0))

    def _notice_longer(self) -> None:
        """Warn where the data goes on behind the length that it told, as endless data does: so does the epoch."""
        if self._run.state.iteration < self._longer_at():
            return
        self._said_longer = True
        told = self._run.own_lengths[1]
        warnings.warn(
            f"{type(self._source.data).__name__} has a length of {told} batches and gives more: the epoch ends where "
            f"the data does; for data without an end, give run() an epoch_length, such as {told}",
            stacklevel=2,
        )

    def _who_is_empty(self) -> str:
        coordinator = self._run.coordinator
        if self._agreed is None or coordinator.world_size == 1:
            return ""
        empty = [str(rank) for rank, n in enumerate(coordinator.gather(self._agreed.total())) if n == 0]
        return f" on rank {', '.join(empty)}"

    def _or_longest(self) -> str:
        if self._agreed is None or self._run.coordinator.world_size == 1:
            return ""
        return ", or train with uneven='longest', in which a rank without data takes part at weight zero"
