"""What is around a rehearsed script in each of its ranks: it ends after some iterations and leaves a trace.

Contract: inside `ScriptWatch.in_place` three classes mean something else to the script, which is not changed.
- `Engine.run` of the engine that trains notes digests before the run and after each iteration (`digests`). That is the
  engine that a `Checkpoint` is attached to, or without one each that is not run inside of another. After the iteration
  `StartOrder.last` all ranks end the run together and save as they do at any end, and the script ends there with 0. So
  nothing that it does with a finished model is done with this one. Schedules see the run's whole length.
- `Store`, and so `Checkpoint`, saves to a folder of the rehearsal in place of the address that the script gives, and
  finds nothing there when the script begins anew.
- `Track` writes to such a folder too, and to no tool.
Votes are about windows of a few groups, so that a stop holds soon. After `StartOrder.meet_at` rank 0 waits for the
rehearsal, which sends its signals then. A rank without a signal does nothing in the meantime but wait in a collective.

What can go wrong: the script's own exceptions leave as ever. A rehearsal that is gone is not waited for longer than a
minute.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import xxhash

from allstep.checkpoint import Checkpoint
from allstep.checkpoint.store import Store
from allstep.engine import Engine, Events, State
from allstep.rehearsal.digests import HeldObjects, digests_of, find_objects, samples_digest
from allstep.rehearsal.iteration_trace import GO, REACHED, SAMPLES, StartOrder, trace_file
from allstep.tracking import Track

_MEETING_S = 60.0
_LOOK_S = 0.005
_WINDOW = 4  # accumulation groups


class ScriptWatch:
    """One start of a script on one rank.

    Args:
        order: what it is to do.
        start: which start of the run's folder it is.
        rank: of this process.
    """

    def __init__(self, order: StartOrder, *, start: int, rank: int) -> None:
        self._order = order
        self._folder = Path(order.folder)
        self._rank = rank
        self._path = trace_file(self._folder, start, rank)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._attached: list[Engine] = []
        self._is_inside = False
        self._is_over = False
        self._held: HeldObjects | None = None
        self._samples = "0"
        self._note(pid=os.getpid())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Be around the script in the body."""
        names: list[tuple[type, str, Callable[[Any], Any]]] = [
            (Engine, "run", self._around_run),
            (Checkpoint, "attach", self._around_attach),
            (Store, "__init__", self._around_store),
            (Store, "choose", self._around_choose),
            (Track, "__init__", self._around_track),
        ]
        with ExitStack() as stack:
            for holder, name, around in names:
                original = getattr(holder, name)
                stack.callback(setattr, holder, name, original)
                setattr(holder, name, around(original))
            yield

    # Engines

    def _around_attach(self, original: Callable[..., Checkpoint]) -> Any:
        def attach(checkpoint: Checkpoint, engine: Engine) -> Checkpoint:
            self._attached.append(engine)
            return original(checkpoint, engine)

        return attach

    def _around_run(self, original: Callable[..., State]) -> Any:
        def run(engine: Engine, *args: Any, **options: Any) -> State:
            trains = engine in self._attached if self._attached else not self._is_inside
            if not trains:
                return original(engine, *args, **options)
            if options.get("window") is None:
                options["window"] = _WINDOW
            self._held = find_objects()
            self._note(begins_at=engine.state.iteration, parts=digests_of(self._held))
            handles = [
                engine.add_event_handler(Events.ITERATION_STARTED, self._before_step),
                engine.add_event_handler(Events.ITERATION_COMPLETED, self._after_iteration),
            ]
            before, self._is_inside = self._is_inside, True
            try:
                state = original(engine, *args, **options)
            finally:
                self._is_inside = before
                for handle in handles:
                    handle.remove()
                self._note(ended_at=engine.state.iteration, complete=engine.extension.is_complete)
            if self._is_over:
                raise SystemExit(0)
            return state

        return run

    def _before_step(self, engine: Engine) -> None:
        # Here, since the step may change the batch that it is given.
        self._samples = samples_digest(engine.state.batch) if engine.state.active else "0"

    def _after_iteration(self, engine: Engine) -> None:
        assert self._held is not None
        iteration, order = engine.state.iteration, self._order
        self._note(iteration=iteration, parts={**digests_of(self._held), SAMPLES: self._samples})
        if order.meet_at is not None and self._rank == 0 and iteration >= order.meet_at:
            self._meet()
        if order.last is not None and iteration >= order.last and engine.state.group_end:
            self._is_over = True
            engine.terminate(reason="the rehearsal ends here", agreed=True)

    def _meet(self) -> None:
        """Wait for the rehearsal, once in all starts."""
        go, deadline = self._folder / GO, time.monotonic() + _MEETING_S
        if not go.exists():
            (self._folder / REACHED).touch()
        while not go.exists() and time.monotonic() < deadline:
            time.sleep(_LOOK_S)  # another process makes the file

    # Folders

    def _around_store(self, original: Callable[..., None]) -> Any:
        def init(store: Store, folder: str, *args: Any, **options: Any) -> None:
            if options.get("storage") is None:
                folder = self._own_place("checkpoints", str(folder))
            original(store, folder, *args, **options)

        return init

    def _around_choose(self, original: Callable[..., Any]) -> Any:
        def choose(store: Store, at: str = "auto") -> Any:
            # A script may name its own folder to go on from, or a checkpoint in it.
            for place, rest in ((at, ""), (os.path.dirname(at), os.path.basename(at))):
                if place and (own := self._place_of("checkpoints", place)).is_dir():
                    return original(store, str(own / rest))
            return original(store, at)

        return choose

    def _around_track(self, original: Callable[..., None]) -> Any:
        def init(track: Track, folder: Any, to: Any = (), **options: Any) -> None:
            original(track, self._place_of("tracks", os.fspath(folder)), (), **options)

        return init

    def _own_place(self, kind: str, address: str) -> str:
        self._note(place=_absolute(address))
        return str(self._place_of(kind, address))

    def _place_of(self, kind: str, address: str) -> Path:
        """The folder of the rehearsal that stands for an address."""
        whole = _absolute(address)
        last = re.sub(r"[^\w.-]+", "-", whole.rstrip("/").rpartition("/")[2])[:40]
        return self._folder / kind / f"{last}-{xxhash.xxh3_64_hexdigest(whole.encode())[:8]}"

    # The trace

    def _note(self, **said: Any) -> None:
        # In one write, whole as far as the kernel got it, whatever kills this process next.
        with open(self._path, "ab", buffering=0) as file:
            file.write(f"{json.dumps(said)}\n".encode())


def _absolute(address: str) -> str:
    return address if "://" in address else os.path.abspath(address)
