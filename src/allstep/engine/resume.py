"""Where an engine's run stands, between runs and when it is saved: `state_dict`, and going on from there.

Contract: a user saves an engine with `state_dict`, also inside a run, and loads it into another, whose next `run` goes
on at that place. `Engine` builds on this as it does on `Listening`: before a run it settles the counters of the one
that was left and takes up the place that was loaded; after one it drops the loop, and the data's own state is kept.
Nothing here crosses ranks. What can go wrong: a state that lacks a key raises before anything has changed, and so does
data that is not the one that was saved.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from allstep.coordination import Coordinator
from allstep.engine.control import Steering
from allstep.engine.position import group_size_over, sampler_of, saved_place, take_up
from allstep.engine.registry import Registry
from allstep.engine.run import Progress, RunPosition, position_from
from allstep.engine.source import END, place_in_data
from allstep.errors import ArgumentError, EngineError


class Resumable(Steering):
    """How a run is saved and goes on.

    Attributes:
        accumulate: global batches whose gradients make one optimizer step.
        is_running: whether `run` is under way.
    """

    registry: Registry

    def __init__(self, coordinator: Coordinator | None, accumulate: int) -> None:
        super().__init__(coordinator)
        if not isinstance(accumulate, int) or accumulate < 1:
            raise ArgumentError(f"accumulate is {accumulate!r}; it must be an int of at least 1")
        self.accumulate = accumulate
        self._drive: Generator[None, None, None] | None = None
        self._is_running = False
        self._was_loaded = False
        self._saved_data: Mapping[str, Any] | None = None
        self._own_data_state: Any = END
        self._user_keys: list[str] = []

    @property
    def is_running(self) -> bool:
        """Whether `run` is under way."""
        return self._is_running

    @property
    def group_size(self) -> int:
        """Iterations in an accumulation group: `accumulate`, times those in which the data gives a global batch."""
        return group_size_over(self.state.dataloader, self.accumulate)

    @property
    def state_dict_user_keys(self) -> list[str]:
        """Names of state attributes to save and load besides the engine's own; append yours."""
        return self._user_keys

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands; collective-free.

        `iteration` counts the steps that were completed, up to the end of the last whole accumulation group, and
        `epoch_began_at` those of them before the present epoch, of which `epochs_completed` came before it;
        `epoch_length` and `max_epochs` or `max_iters` are the run's terms. All are plain numbers. `data` is there when
        the data can tell its place: its `position`, the same on all ranks, or its `own` state, each rank's. `finished`
        is there when the run was ended as finished: why.
        """
        state, progress = self.state, self.progress
        terms = {"max_epochs": state.max_epochs} if state.max_iters is None else {"max_iters": state.max_iters}
        iteration = state.iteration - progress.step_is_open - progress.steps_in_group
        data = self._data_place(iteration)
        return {
            "iteration": iteration,
            "epochs_completed": state.epoch - progress.epoch_is_open,
            "epoch_began_at": progress.epoch_began_at,
            "epoch_length": state.epoch_length,
            **terms,
            **({} if data is None else {"data": data}),
            **({"finished": state.stop_reason} if state.outcome == "finished" else {}),
            **{key: getattr(state, key) for key in self._user_keys},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over where another run stood; the next `run` goes on from there.

        Args:
            state_dict: what `state_dict` gave, or a dict with `iteration` or `epoch` (completed ones),
                `max_epochs` or `max_iters`, `epoch_length`, and the user keys.

        Raises:
            ValueError: a key is missing, or two exclude each other; nothing was changed.
            EngineError: the engine is running.
        """
        if self._is_running:
            raise EngineError("this engine is running; load a state before run(), or after it")
        place = position_from(state_dict, self._user_keys)
        self._drop_run()
        self._stand_at(place)
        self.state.dataloader = None
        finished = state_dict.get("finished")
        self.state.stop_reason, self.state.outcome = finished, None if finished is None else "finished"
        for key in self._user_keys:
            setattr(self.state, key, state_dict[key])
        self._saved_data, self._own_data_state = state_dict.get("data"), END
        self._was_loaded = True

    def _settle_counters(self) -> None:
        """Bring the counters back to what was completed, after a run that ended in the middle of an epoch."""
        state, progress = self.state, self.progress
        state.iteration -= progress.step_is_open + progress.steps_in_group
        progress.steps_in_group = 0
        if progress.abandoned:
            progress.epoch_began_at = state.iteration
        else:
            state.epoch -= progress.epoch_is_open
        progress.step_is_open = progress.epoch_is_open = progress.abandoned = False

    def _stand_at(self, place: RunPosition) -> None:
        state = self.state
        state.iteration, state.epoch = place.iteration, place.epochs_completed
        state.epoch_length, state.max_epochs, state.max_iters = place.epoch_length, place.max_epochs, place.max_iters
        self.progress = Progress(epoch_began_at=place.epoch_began_at)
        self.registry.schedule(state)

    def _take_up(self, data: Any, max_iters: int | None) -> tuple[int | None, int | None]:
        """Bring data and counters to the place that was loaded: the batch to open with, and `max_iters` for this data.

        None is the batch where the data has to be brought there by counting.
        """
        state, saved = self.state, self._saved_data
        if not self._was_loaded or saved is None:
            return None, max_iters
        self._saved_data = None
        terms = state.epoch_length, state.max_epochs, state.max_iters
        place = RunPosition(state.iteration, state.epoch, self.progress.epoch_began_at, *terms)
        taken = take_up(data, saved, place, group_size_over(data, self.accumulate))
        self._stand_at(taken.place)
        return taken.opens_at, state.max_iters if max_iters == place.max_iters else max_iters

    def _data_place(self, iteration: int) -> dict[str, Any] | None:
        """What to save of the place in the data."""
        state, progress = self.state, self.progress
        if state.dataloader is None:
            return dict(self._saved_data) if self._was_loaded and self._saved_data is not None else None
        sampler, epoch, done = sampler_of(state.dataloader), 0, 0
        if sampler is not None:
            completed = state.epoch - progress.epoch_is_open
            length = sampler.batches_in_epoch
            epoch, done = place_in_data(iteration, progress.epoch_began_at, state.epoch_length, completed, length)
        own = self._own_data_state if self._loop is None else self._loop.supply.own_state(iteration)
        return saved_place(state.dataloader, epoch, done, own, self.group_size)

    def _drop_run(self) -> None:
        if self._loop is not None:
            progress = self.progress
            done = self.state.iteration - progress.step_is_open - progress.steps_in_group
            self._own_data_state = self._loop.supply.own_state(done)
        if self._drive is not None:
            self._drive.close()
        self._drive = self._loop = None
