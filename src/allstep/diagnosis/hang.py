"""When the ranks make no progress, which of them the others wait for, and which are slow: pure functions.

`HangLimits` say how long each section of a rank's work may last without progress. A limit is learnt: `MULTIPLE` times
the longest stay in the section that any rank has had so far, but no less than the section's lower bound and no more
than its upper one. The upper one also holds while nothing was seen. Being idle, between engines, has no limit unless
one is given, and neither has startup: a script that trains in a loop of its own is in startup to its end.

`overdue` is asked once a second whether the run hangs. It does when a rank is frozen, or when one has been in a section
for longer than allowed and no other rank explains that: one that is elsewhere, or further back, and within its own
limit. It also does when all ranks have waited for longer than `apart`, not all in the same place: each then waits for
another.

A missing heartbeat alone makes no rank frozen: one call may hold the interpreter's lock for long. A second witness has
to agree, its process as the kernel shows it to its node's service. One that is stopped is frozen. One that is busy is
alive, and its section's limit decides. One that sleeps is frozen in a section that has a limit. In a section without
one it is alive: it is a hang once others wait for it for longer than a handler may take, as if it beat. One that a
debugger holds is not frozen. Where the process cannot be seen, silence is all there is to go by.

When the run hangs, stacks are gathered, and `diagnose` says who is behind. `stragglers` are named and never ended.

A `HangDetector` belongs to one monitor. It makes a `RankProgress` of each record and asks these functions. Besides the
limits it keeps only which ranks were found slow, so that each is reported once. It reads no clock: the monitor passes
`age`, which gives the seconds since something was heard.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from allstep.diagnosis.backward_passes import explain_passes
from allstep.diagnosis.record import ProcessActivity, RankRecord
from allstep.diagnosis.stacks import at_a_prompt, waits_in
from allstep.errors import ConfigurationError
from allstep.protocol.messages import Heartbeat
from allstep.protocol.registration import spans

MULTIPLE = 10.0
"""How many times the longest stay that was seen a section may last."""

# A run that is ended by mistake costs more than minutes of one that hangs: compiling again, a slow file system.
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "startup": (math.inf, math.inf),
    "data": (300.0, 1800.0),
    "step": (300.0, 1800.0),
    "evaluation": (600.0, 1800.0),
    "checkpoint": (600.0, 3600.0),
    "handler": (600.0, 3600.0),
    "idle": (math.inf, math.inf),
}

SLOW = 1.5
"""How many times the others' median of its own step time makes a rank a straggler."""

_GRADIENTS = ("gradients", "buffers")
_TIMED = {"main_first"}  # waits with a limit of their own

_FREE = ("startup", "idle")  # where a rank may stay for ever, but not while others wait for it
_NOTICEABLE = 0.002  # seconds a step; below it, differences are the machine's


@dataclass(frozen=True, slots=True)
class HangLimits:
    """Seconds. `silence` is how long a rank may go without a heartbeat, `link` two nodes without a word.

    `apart` is how long all ranks may wait for their peers in different places: each then waits for another. No work
    makes such a wait longer, only the last bytes of a collective that some have left already.
    """

    bounds: Mapping[str, tuple[float, float]] = field(default_factory=lambda: _BOUNDS)
    silence: float = 15.0
    link: float = 15.0
    apart: float = 15.0

    @classmethod
    def parse(cls, text: str) -> HangLimits:
        """Limits from text like `step=60,data=5:300,silence=15,link=15,apart=15`; what is not named keeps its default.

        One number bounds a section from above, two bound what is learnt from both sides, and `off` takes the limit
        away.

        Raises:
            ConfigurationError: an unknown name, or not seconds.
        """
        bounds = dict(_BOUNDS)
        single = {name: getattr(cls(), name) for name in ("silence", "link", "apart")}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name in bounds:
                bounds[name] = _range(name, value, bounds[name])
            elif name in single:
                single[name] = _seconds(name, value)
            else:
                raise ConfigurationError(
                    f"limits: {part!r} names none of {', '.join((*bounds, *single))}; write step=60,data=300"
                )
        return cls(bounds, **single)

    def of(self, section: str, longest: float | None) -> float:
        """How long a section may last, given the longest stay that was seen (None: none has ended yet)."""
        low, high = self.bounds[section]
        return high if longest is None else min(high, max(low, MULTIPLE * longest))


WITHOUT_LIMITS = ",".join(f"{name}=off" for name in (*_BOUNDS, "silence", "apart"))
"""The text that takes all limits away but that of a link between nodes."""


def _range(name: str, value: str, default: tuple[float, float]) -> tuple[float, float]:
    low, colon, high = value.partition(":")
    if not colon:  # the default lower bound holds, unless the upper one is below it
        most = _seconds(name, low)
        return min(default[0], most), most
    bounds = _seconds(name, low), _seconds(name, high)
    if bounds[0] > bounds[1]:
        raise ConfigurationError(f"limits: {name}={value} has a lower bound above the upper one; swap them")
    return bounds


def _seconds(name: str, value: str) -> float:
    if value == "off":
        return math.inf
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise ConfigurationError(f"limits: {name}={value!r} must be seconds above 0, two of them as LOW:HIGH, or off")
    return seconds


@dataclass(frozen=True, slots=True)
class RankProgress:
    """A rank that is present: its last heartbeat, and the seconds since that came.

    `away` is true where nothing comes from its whole node, so that its silence says nothing about the rank. `stacks` is
    what is known of its threads, and `waits` what it waits for its peers in, by its own word or by its stack.
    `activity` is what its process was last seen to do, and `busy` the seconds since it was seen busy though silent.
    """

    heartbeat: Heartbeat
    age: float
    away: bool = False
    stacks: str = ""
    waits: str = ""
    activity: ProcessActivity | None = None
    busy: float = math.inf

    @property
    def rank(self) -> int:
        """Whose it is."""
        return self.heartbeat.rank

    @property
    def still(self) -> float:
        """Seconds since its last known progress."""
        return self.heartbeat.seconds + self.age

    @property
    def place(self) -> tuple[int, int]:
        """How far it has come."""
        return self.heartbeat.epoch, self.heartbeat.iteration


@dataclass(frozen=True, slots=True)
class Hang:
    """Ranks that the others wait for, with a clause about each, and what that means."""

    behind: Mapping[int, str]
    explanation: str


def longest_stays(heartbeats: Sequence[Heartbeat]) -> dict[str, float]:
    """The longest stay in each section on any rank."""
    longest: dict[str, float] = {}
    for each in heartbeats:
        for section, lasted in each.longest.items():
            if lasted > longest.get(section, 0.0):
                longest[section] = lasted
    return longest


def overdue(ranks: Sequence[RankProgress], limits: HangLimits, longest: Mapping[str, float]) -> bool:
    """Whether the run hangs.

    Args:
        ranks: all that are present.
        limits: of this run.
        longest: what `longest_stays` found, in seconds by section.
    """
    # A silent rank needs no limit of a section: it cannot even say where it is. Nor do ranks that wait for each other.
    if silent(ranks, limits) or _wait_for_each_other(ranks, limits):
        return True
    over: list[RankProgress] = []
    within: list[RankProgress] = []
    allowed = {section: limits.of(section, longest.get(section)) for section in limits.bounds}
    for each in ranks:
        (over if each.still > allowed[each.heartbeat.section] else within).append(each)
    if not over:
        return False
    # Sections without a limit explain a wait only for as long as a handler may take, else nothing would ever be a hang.
    patience = {section: allowed["handler"] for section in _FREE if allowed[section] == math.inf}
    within = [
        each for each in within if not each.waits and each.still <= patience.get(each.heartbeat.section, math.inf)
    ]
    return any(not any(_explains(other, each) for other in within) for each in over)


def _wait_for_each_other(ranks: Sequence[RankProgress], limits: HangLimits) -> bool:
    """Whether all ranks say that they wait, and not in the same place, for so long that none can be on its way."""
    waits = {each.heartbeat.waiting for each in ranks}
    if "" in waits or waits & _TIMED or any(each.still <= limits.apart or each.away for each in ranks):
        return False
    # Engines all wait in "agreement", each with the ranks that run it.
    return len({(each.heartbeat.engine, each.heartbeat.waiting) for each in ranks}) > 1


def silent(ranks: Sequence[RankProgress], limits: HangLimits) -> list[RankProgress]:
    """The ranks whose heartbeats stopped and whose processes do nothing, though their node is heard from."""
    return [each for each in ranks if each.age > limits.silence and not each.away and _is_frozen(each, limits)]


def _is_frozen(each: RankProgress, limits: HangLimits) -> bool:
    """What the second witness says of a rank that is silent."""
    if each.activity is None or each.activity is ProcessActivity.STOPPED:
        return True
    if each.activity is ProcessActivity.TRACED:
        return False
    may_sleep = each.activity is ProcessActivity.ASLEEP and limits.bounds[each.heartbeat.section][1] == math.inf
    return each.busy > limits.silence and not may_sleep


def waits_for_a_person(record: RankRecord) -> bool:
    """Whether a rank is at a debugger's prompt, or held by a debugger from outside; asked once stacks were gathered."""
    return record.activity is ProcessActivity.TRACED or at_a_prompt(record.stacks)


def _explains(other: RankProgress, stuck: RankProgress) -> bool:
    """Whether a rank that is within its limit may be what another one waits for."""
    return (
        other.heartbeat.section != stuck.heartbeat.section
        or other.heartbeat.engine != stuck.heartbeat.engine
        or other.place < stuck.place
    )


def diagnose(ranks: Sequence[RankProgress], limits: HangLimits) -> Hang:
    """Who is behind, once the run hangs.

    That is the ranks that are silent; else those that wait for no other; else the few that wait for something else than
    the rest do; else those that have come least far.
    """
    quiet = silent(ranks, limits)
    if quiet:
        return Hang({each.rank: _silence(each) for each in quiet}, "")
    # The clearest case first: all wait but some, which therefore are what the others wait for.
    waiting = [each for each in ranks if each.waits]
    working = [each for each in ranks if not each.waits]
    if waiting and working:
        found = {each.rank: f"hangs in {_where(each)}, and waits for no other rank" for each in _least(working)}
        return Hang(found, f"{_ranks(waiting)} in {_named(waiting)}")
    # All wait, or of none it is known. Ranks that wait in different places did not follow the same course.
    groups = _groups(ranks)
    if len(groups) > 1:
        odd = min(groups.values(), key=lambda group: (len(group), min(each.place for each in group)))
        return Hang({each.rank: f"hangs in {_where(each)}, alone there" for each in odd}, _divergence(groups))
    behind = _least(ranks)
    if len(behind) < len(ranks):
        return Hang({each.rank: f"hangs in {_where(each)}, behind the others" for each in behind}, "")
    return Hang(
        {each.rank: f"hangs in {_where(each)}, as all ranks do" for each in ranks},
        "no rank is behind: all are at the same place, so look at what the stacks share, and at the network",
    )


def stragglers(own_steps: Mapping[int, float]) -> dict[int, float]:
    """Ranks whose own time for a step is at least `SLOW` times the median of the others, and how many times.

    Args:
        own_steps: by rank, seconds of a step without waiting; 0 where it is not known yet.
    """
    known = {rank: own for rank, own in own_steps.items() if own > 0}
    if len(known) < 2:
        return {}
    ordered = sorted(known.values())
    found = {}
    half = statistics.median_low(ordered)
    for rank, own in known.items():
        if own < SLOW * half:  # most ranks: thousands of them need no median of their own others
            continue
        others = ordered.copy()
        others.remove(own)
        median = statistics.median(others)
        if own >= SLOW * median and own - median >= _NOTICEABLE:
            found[rank] = own / median
    return found


def _least(ranks: Sequence[RankProgress]) -> list[RankProgress]:
    least = min(each.place for each in ranks)
    return [each for each in ranks if each.place == least]


def _groups(ranks: Sequence[RankProgress]) -> dict[tuple[str, str], list[RankProgress]]:
    groups: dict[tuple[str, str], list[RankProgress]] = {}
    for each in ranks:
        groups.setdefault((each.heartbeat.engine, each.waits), []).append(each)
    return groups


def _divergence(groups: Mapping[tuple[str, str], Sequence[RankProgress]]) -> str:
    places = "; ".join(
        f"{_ranks(group)} in {waits or 'nothing known'}" + (f" (engine {engine!r})" if engine else "")
        for (engine, waits), group in groups.items()
    )
    return (
        f"the ranks came apart: {places}. A collective in a step or handler must be called by all ranks; an engine "
        "that runs on some ranks only needs Engine(step, coordinator=Alone())"
    )


def _with_passes(hang: Hang, ranks: Sequence[RankProgress]) -> Hang:
    """What ranks know of their backward passes, where some wait for gradients and others do not."""
    in_backward = [each for each in ranks if each.waits in _GRADIENTS]
    if not in_backward or len(in_backward) == len(ranks):
        return hang
    beats = {each.rank: each.heartbeat for each in ranks}
    said = explain_passes(
        {rank: beat.left_out for rank, beat in beats.items()}, {rank: beat.most_passes for rank, beat in beats.items()}
    )
    return Hang(hang.behind, "; ".join(filter(None, (hang.explanation, said))))


def _ranks(group: Sequence[RankProgress]) -> str:
    one = len(group) == 1
    return f"{'rank' if one else 'ranks'} {spans(each.rank for each in group)} wait{'s' if one else ''}"


def _named(group: Sequence[RankProgress]) -> str:
    return ", ".join(sorted({each.waits for each in group})[:8])


def _where(each: RankProgress) -> str:
    last = each.heartbeat
    place = f"section {last.section}"
    if last.engine:
        place += f" of engine {last.engine!r}"
    if last.epoch or last.iteration:
        place += f" at epoch {last.epoch}, iteration {last.iteration}"
    place += f", without progress for {each.still:.0f} s"
    if each.waits:
        place += f", waiting in {each.waits}"
    return f"{place}; {_silence(each)}" if each.age > SUSPECT_S else place


_SILENT_BECAUSE = {
    None: "it is frozen (as by SIGSTOP), or in a call that holds the interpreter lock",
    ProcessActivity.STOPPED: "its process is stopped, as by SIGSTOP",
    ProcessActivity.ASLEEP: "its process sleeps, in a call that holds the interpreter lock",
    ProcessActivity.BUSY: "its process is busy, in a call that holds the interpreter lock",
    ProcessActivity.TRACED: "a debugger holds its process",
}


def _silence(each: RankProgress) -> str:
    return f"no heartbeat for {each.age:.0f} s: {_SILENT_BECAUSE[each.activity]}"


SUSPECT_S = 2.5
"""Seconds without a heartbeat after which a rank is suspected, where the others failed because of some rank."""

Age = Callable[[float], float]
"""Seconds since a time at which something was heard."""


class HangDetector:
    """The limits of a run, and the ranks that were slow in it."""

    def __init__(self, limits: HangLimits) -> None:
        self._limits = limits
        self._slow_now: dict[int, float] = {}
        self._slow_ever: dict[int, float] = {}

    @property
    def slow(self) -> list[tuple[int, float]]:
        """The ranks that were slow at any time, and how many times slower at the last."""
        return sorted(self._slow_ever.items())

    def hangs(self, records: Collection[RankRecord], age: Age, away: Collection[int] = ()) -> bool:
        """Whether the run hangs; `away` are ranks of nodes that are not heard from."""
        longest = longest_stays([record.heartbeat for record in records if record.heartbeat is not None])
        return overdue(_progress(records, age, away), self._limits, longest)

    def diagnose(self, records: Collection[RankRecord], age: Age) -> Hang:
        """Who is behind, once stacks were gathered."""
        ranks = _progress(records, age)
        return _with_passes(diagnose(ranks, self._limits), ranks) if ranks else Hang({}, "")

    def suspects(self, records: Collection[RankRecord], age: Age) -> Hang:
        """Who is behind, where others have failed because of a rank that did not report.

        It is a rank that is silent, or else one that waits for no other.
        """
        ranks = _progress(records, age)
        # Sooner than the limit for silence, since it is known that something is wrong.
        silent = [each for each in ranks if each.age > SUSPECT_S]
        working = [each for each in ranks if not each.waits]
        if silent:
            return Hang({each.rank: _silence(each) for each in silent}, "")
        return diagnose(working, self._limits) if working else Hang({}, "")

    def new_stragglers(self, records: Iterable[RankRecord]) -> list[tuple[int, float]]:
        """Ranks that have become slow since the last call, and how many times slower than the others they are."""
        beating = [record for record in records if record.heartbeat and record.present]
        found = stragglers({record.rank: record.heartbeat.own_step for record in beating if record.heartbeat})
        new = [(rank, ratio) for rank, ratio in found.items() if rank not in self._slow_now]
        # A rank that recovers is forgotten here, so that it is reported again if it becomes slow again.
        self._slow_now = found
        self._slow_ever.update(found)
        return new


def _progress(records: Iterable[RankRecord], age: Age, away: Collection[int] = ()) -> list[RankProgress]:
    """The progress of each rank whose World is open and that is not on its way out with an exception."""
    return [
        RankProgress(
            heartbeat,
            age(record.heard),
            record.rank in away,
            record.stacks,
            heartbeat.waiting or (waits_in(record.stacks) if record.stacks else ""),
            record.activity,
            age(record.busy),
        )
        for record in records
        if record.present and (record.failed is None or record.only_seen)
        for heartbeat in (record.heartbeat or _before_the_first(record.rank),)
    ]


def _before_the_first(rank: int) -> Heartbeat:
    """Where a rank is that was let in and has sent no heartbeat yet."""
    return Heartbeat(rank, 0, 0, 0, 0, "startup", 0.0)
