"""The loop against a straightforward model of it, over random lengths, terms and requests."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from allstep.engine import Engine, Events
from tests.engine.recording import NoLength, nothing

REQUESTS = ("terminate", "terminate_epoch", "interrupt")
PLACES = (
    *("STARTED", "EPOCH_STARTED", "GET_BATCH_STARTED", "GET_BATCH_COMPLETED"),
    *("ITERATION_STARTED", "ITERATION_COMPLETED", "EPOCH_COMPLETED"),
)
Entry = tuple[str, int, int, Any]


class Ended(Exception):
    """The model's run or epoch ended."""


STEP_DONE = ("OPTIMIZER_STEP_COMPLETED", "ITERATION_COMPLETED")


class Model:
    """What a run over `range(length)` does, written as the words of the events' documentation, with exceptions."""

    def __init__(self, length: int, epoch_length: int | None, known: bool, requests: dict[int, str]) -> None:
        self.length = length
        self.counted = epoch_length or (length if known else None)
        self.requests = requests
        self.seen: list[Entry] = []
        self.fired = self.epoch = self.iteration = 0
        self.asked: set[str] = set()

    def fire(self, name: str, batch: Any = None) -> None:
        self.seen.append((name, self.epoch, self.iteration, batch))
        if name in PLACES:
            self.asked |= {self.requests.get(self.fired, "")} - {""}
            self.fired += 1

    def look(self) -> None:
        if self.asked & {"terminate", "terminate_epoch"}:
            raise Ended
        if "interrupt" in self.asked:
            self.asked.discard("interrupt")
            self.fire("INTERRUPT")

    def run(self, max_epochs: int | None, max_iters: int | None) -> list[Entry]:
        self.fire("STARTED")
        if "interrupt" in self.asked:
            self.look()
        position: int | None = None
        while "terminate" not in self.asked:
            if self.epoch == max_epochs or self.iteration == max_iters:
                break
            self.epoch += 1
            done = 0
            try:
                self.fire("EPOCH_STARTED")
                self.look()
                position = 0 if position is None else position
                while True:
                    self.fire("GET_BATCH_STARTED")
                    self.look()
                    if position == self.length:
                        if self.counted is None and done:
                            break
                        self.fire("DATALOADER_STOP_ITERATION")
                        position = 0
                    batch, position = position, position + 1
                    self.fire("GET_BATCH_COMPLETED", batch)
                    self.look()
                    self.iteration += 1
                    done += 1
                    self.fire("ITERATION_STARTED", batch)
                    self.look()
                    self.fire("OPTIMIZER_STEP_COMPLETED", batch)
                    self.fire("ITERATION_COMPLETED", batch)
                    self.look()
                    if done == self.counted:
                        break
                    if self.iteration == max_iters:
                        self.asked.add("terminate")
                        raise Ended
            except Ended:
                if "terminate" in self.asked:
                    break
                self.fire("TERMINATE_SINGLE_EPOCH")
                position = None
            self.fire("EPOCH_COMPLETED")
            self.asked.discard("terminate_epoch")
            if "terminate" not in self.asked:
                self.look()
        if "terminate" in self.asked:
            self.fire("TERMINATE")
        self.fire("COMPLETED")
        return self.seen


def what_the_engine_does(data: Any, epoch_length: int | None, requests: dict[int, str], **terms: int) -> list[Entry]:
    engine = Engine(nothing)
    seen: list[Entry] = []
    fired = iter(range(100_000))

    def note(name: str) -> None:
        has_batch = name in ("GET_BATCH_COMPLETED", "ITERATION_STARTED") or name in STEP_DONE
        seen.append((name, engine.state.epoch, engine.state.iteration, engine.state.batch if has_batch else None))
        if name in PLACES:
            request = requests.get(next(fired))
            if request is not None:
                getattr(engine, request)()

    for event in Events:
        engine.add_event_handler(event, lambda *_, name=event.name: note(name))
    while not seen or seen[-1][0] != "COMPLETED":
        engine.run(data, epoch_length=epoch_length, **terms)
    return seen


@settings(max_examples=250, deadline=None)
@given(
    length=st.integers(1, 6),
    epoch_length=st.one_of(st.none(), st.integers(1, 8)),
    known=st.booleans(),
    terms=st.one_of(
        st.builds(lambda n: {"max_epochs": n}, st.integers(1, 4)),
        st.builds(lambda n: {"max_iters": n}, st.integers(1, 15)),
    ),
    requests=st.dictionaries(st.integers(0, 40), st.sampled_from(REQUESTS), max_size=4),
)
def test_the_engine_does_what_the_model_does(
    length: int, epoch_length: int | None, known: bool, terms: dict[str, int], requests: dict[int, str]
) -> None:
    data = range(length) if known else NoLength(length)
    expected = Model(length, epoch_length, known, requests).run(terms.get("max_epochs"), terms.get("max_iters"))
    assert what_the_engine_does(data, epoch_length, requests, **terms) == expected
