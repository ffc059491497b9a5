"""What the packages above need from a World besides what a script uses: the one door for them.

Contract: `allstep.world.internals(world)` gives the record. The engine asks its coordinator how to agree, tells its
activity where the loop is, and tells its reporter what a run raised. Checkpoints ask which modules are wrapped, and
finish what is under way before the World closes. No caller replaces a field. The record holds as long as the World is
open.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from torch.utils.hooks import RemovableHandle

from allstep.coordination import Coordinator
from allstep.duration_words import took_in_words
from allstep.parallel import Compilations
from allstep.parallel.parts_hint import parts_hint
from allstep.protocol.heartbeat import RankActivity
from allstep.suggestions import hint_for
from allstep.world.failures import Reporter

log = logging.getLogger("allstep.world")


@dataclass(slots=True)
class WorldInternals:
    """The inner parts of one World.

    Attributes:
        coordinator: how the engines of this world agree.
        activity: where this rank is; the monitoring service is told from it.
        reporter: tells exceptions to that service; None where no service watches over the ranks.
        summary: what is said at a good end, by what it is about; each writer replaces its own.
        compilations: what torch compiles, where a wrapped module is compiled.
        end_step: tells a device that collects work, such as XLA, that a step ends; None where there is nothing to tell.
        hide_log: stops showing what is logged; see `log_output`.
    """

    coordinator: Coordinator
    activity: RankActivity
    reporter: Reporter | None
    summary: dict[str, str] = field(default_factory=dict)
    compilations: Compilations | None = None
    end_step: Callable[[], None] | None = None
    hide_log: Callable[[], None] = lambda: None
    _opened_at: float = field(default_factory=time.monotonic)
    _wrapped: list[weakref.ref[nn.Module]] = field(default_factory=list)
    _before_close: list[weakref.WeakMethod[Callable[[bool], None]]] = field(default_factory=list)
    _held: list[RemovableHandle] = field(default_factory=list)

    def add_wrapped(self, module: nn.Module) -> None:
        """Take note of a module that `World.wrap` gave; it is not kept alive by this."""
        self._wrapped.append(weakref.ref(module))

    def hold(self, hook: RemovableHandle | None) -> None:
        """Have a hook that something has registered, if any, be removed when the World ends."""
        if hook is not None:
            self._held.append(hook)

    def before_close(self, finish: weakref.WeakMethod[Callable[[bool], None]]) -> None:
        """Have a method called once before the ranks leave each other; it is not kept alive by this.

        It is told whether the World ends by an exception. What it raises leaves `close` when the World is closed.
        """
        self._before_close = [*(each for each in self._before_close if each() is not None), finish]

    def finish(self, *, failed: bool) -> Exception | None:
        """Call these methods; the first exception of one."""
        for hook in self._held:
            hook.remove()
        methods = [method for reference in self._before_close if (method := reference()) is not None]
        self._before_close.clear()
        raised: Exception | None = None
        for method in methods:
            try:
                with self.activity.section("checkpoint"):
                    method(failed)
            except Exception as error:  # the other methods, and the other ranks, are still to be served
                raised = raised or error
        if self.compilations is not None:
            self.summary["compile"] = self.compilations.in_words()
        if not failed and raised is None and self.summary:
            took = time.monotonic() - self._opened_at
            log.info(
                "done in %s: %s", took_in_words(took), "; ".join(f"{of}: {what}" for of, what in self.summary.items())
            )
        self.hide_log()
        return raised

    def note_exception(self, error: BaseException) -> None:
        """An exception leaves the World's `with` block: it is given a hint where there is one, and told on."""
        hint = hint_for(error) or parts_hint(error)
        if hint is not None:
            error.add_note(hint)
        if self.reporter is not None:
            self.reporter.leaving(error)

    def wrapped_modules(self) -> list[nn.Module]:
        """What `World.wrap` gave, in order, as far as it is still in use."""
        return list(self.numbered_modules().values())

    def numbered_modules(self) -> dict[int, nn.Module]:
        """The same, each with its number among all that were wrapped, which is the same on every rank."""
        return {at: module for at, reference in enumerate(self._wrapped) if (module := reference()) is not None}
