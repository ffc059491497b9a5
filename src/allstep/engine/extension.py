"""What a library that extends `Engine` may ask of it, besides what a training script does.

Contract: `engine.extension` is the one door for metrics, checkpoints and handlers. It reads where a run stands, which
of its parts take part in the comparison of ranks, and lets a handler decide what `Engine.run` raises at its end. All of
it may be called from handlers and between runs. Nothing here crosses ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import ref

from allstep.engine.events import Events
from allstep.engine.handshake import Reduction
from allstep.engine.prefetch import count_samples
from allstep.engine.run_plan import is_done

if TYPE_CHECKING:
    from allstep.engine.engine import Engine

_WITH_A_BATCH = frozenset({Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED, Events.ITERATION_COMPLETED})


class Extension:
    """The door of one engine for what extends it.

    Attributes:
        reductions: what is reduced over ranks at the engine's events; ranks compare it when a run begins. Append and
            remove between runs, on every rank alike.
        leaving: what `run` raises once, in place of returning, when the run has ended; None to return.
    """

    def __init__(self, engine: Engine) -> None:
        # Not a reference that keeps it: an engine that nobody holds is freed at once, with its last batch and output.
        self._ref = ref(engine)
        self.reductions: list[Reduction] = []
        self.leaving: BaseException | None = None

    @property
    def _engine(self) -> Engine:
        engine = self._ref()
        assert engine is not None
        return engine

    @property
    def epoch_began_at(self) -> int:
        """Iterations of the run that were done when the present epoch began."""
        return self._engine.progress.epoch_began_at

    @property
    def epoch_is_open(self) -> bool:
        """Whether epoch `state.epoch` has begun and not ended."""
        return self._engine.progress.epoch_is_open

    @property
    def is_complete(self) -> bool:
        """Whether all epochs or iterations that were asked for have been run."""
        state = self._engine.state
        return is_done(state.iteration, state.epoch - self.epoch_is_open, state.max_epochs, state.max_iters)

    @property
    def is_idle(self) -> bool:
        """Whether this rank has no batch in the present iteration, so that `state.output` means nothing.

        At the end of an epoch or a run it is False, even where the last iteration was such a one.
        """
        return not self._engine.state.active and self._engine.last_event_name in _WITH_A_BATCH

    def samples_in_batch(self) -> int:
        """How many samples this rank's present batch has."""
        state = self._engine.state
        return state.samples if state.samples is not None else (self._engine.samples_in or count_samples)(state.batch)
