"""The failure report: a `Diagnosis` as text for a reader who was not watching, and as values for JSON. Pure.

`failure_text` is what ends a failed run in the terminal; `failure_json` is what `failure.json` holds. Both put the
first cause first. `cause_line` is that cause in one line. `last_lines` picks what to show of a rank's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from allstep.diagnosis.rank_outcome import OutcomeKind, RankOutcome
from allstep.diagnosis.root_cause import Diagnosis
from allstep.diagnosis.stacks import main_thread, set_off
from allstep.protocol.last_words import without_torchs_prefix
from allstep.protocol.registration import spans

LINES = 50
"""Lines of a rank's output that the report repeats, at most."""

BESIDE_TRACEBACK = 15
"""The same, where the report has the traceback of its failure."""

_FRAMES = 40
_GROUPS = 16  # lines about others
_ALSO = 3  # further causes that are shown with a traceback
_STACKS = 4  # ranks behind whose stacks are shown; the file has all
_TRACEBACKS = ("Traceback (most recent call last)", "  + Exception Group Traceback")
_DUMPS = (*_TRACEBACKS, "Fatal Python error")
_SILENT = (
    OutcomeKind.SIGNAL,
    OutcomeKind.EXIT,
    OutcomeKind.LOST,
    OutcomeKind.NODE_LOST,
    OutcomeKind.EARLY,
    OutcomeKind.HANG,
)  # said nothing at their end
_FAILED_TOO = (OutcomeKind.SIGNAL, OutcomeKind.ERROR, OutcomeKind.EXIT, OutcomeKind.LOST, OutcomeKind.NODE_LOST)


def failure_text(
    diagnosis: Diagnosis,
    *,
    name: str = "",
    tails: Mapping[int, str] | None = None,
    logs: Mapping[int, Path] | None = None,
) -> str:
    """The block that ends a failed run: first cause first, then each further cause, then the others, one line each.

    Args:
        case: what happened.
        name: the run's name.
        tails: the last text of ranks' output, where the caller reads it; else what came with their ends is shown.
        logs: where each rank's whole output is.
    """
    cause = diagnosis.cause
    lines = [f"{f'run {name}' if name else 'the run'} failed: {_headline(diagnosis)}", f"  {cause.what}"]
    lines += [f"  {line}" for line in filter(None, (_place(cause), diagnosis.explanation, cause.note))]
    if cause.traceback:
        lines += [f"  {line}" for line in set_off(_cut(cause.traceback))]
    lines += _stacks(diagnosis)
    last = _output(cause, tails)
    if last:
        lines += ["  its last lines of output:", *(f"    {line}".rstrip() for line in last)]
    elif tails is not None and cause.kind in (OutcomeKind.SIGNAL, OutcomeKind.EXIT) and not cause.traceback:
        lines.append("  it wrote nothing to standard error")
    if logs and cause.rank in logs:
        lines.append(f"  its whole output: {logs[cause.rank]}")
    for also in _further(diagnosis):
        lines.append(f"  rank {also.rank} failed too: {also.what}")
        lines += [f"    {line}" for line in (_place(also), *set_off(_cut(also.traceback))[-12:])]
    lines += [f"  {line}" for line in _others(diagnosis)]
    lines += [f"  {straggler_line(rank, ratio)}" for rank, ratio in diagnosis.slow]
    return "\n".join(lines) + "\n"


def failure_json(
    diagnosis: Diagnosis,
    *,
    name: str = "",
    tails: Mapping[int, str] | None = None,
    logs: Mapping[int, Path] | None = None,
) -> dict[str, object]:
    """The same as values that JSON can carry."""

    def one(each: RankOutcome) -> dict[str, object]:
        values = asdict(each)
        values["kind"] = str(each.kind)
        values["output"] = "\n".join(_output(each, tails))
        values["log"] = str(logs[each.rank]) if logs and each.rank in logs else ""
        return values

    return {
        "version": 1,
        "run": name,
        "attempt": diagnosis.attempt,
        "world_size": diagnosis.world_size,
        "exit_code": diagnosis.exit_code,
        "cause": one(diagnosis.cause),
        "others": [one(each) for each in diagnosis.others],
        "explanation": diagnosis.explanation,
        "stragglers": [{"rank": rank, "ratio": round(ratio, 3)} for rank, ratio in diagnosis.slow],
    }


def cause_line(diagnosis: Diagnosis) -> str:
    """The first cause in one line."""
    cause = diagnosis.cause
    place = f", epoch {cause.epoch}, iteration {cause.iteration}" if cause.epoch else ""
    what = cause.what.strip().splitlines()[0] if cause.what.strip() else cause.kind.value
    last = (cause.traceback or cause.output).strip().splitlines()[-1:]
    words = f" ({without_torchs_prefix(last[0].strip())[:200]})" if last and cause.kind is OutcomeKind.EXIT else ""
    return f"rank {cause.rank}: {what[:200]}{words}{place}"


def straggler_line(rank: int, ratio: float) -> str:
    """A slow rank, in words."""
    return f"rank {rank} is slow: its own part of a step takes {ratio:.1f} times the others'"


def last_lines(output: str, traceback: str = "") -> list[str]:
    """The end of what a rank wrote.

    Args:
        output: the end of its output.
        traceback: of its failure, which is left out. Where none is known, the lines begin with the last traceback or
            crash dump that was written, if there is one.
    """
    # A progress bar writes a line over and over, with a carriage return before each; what it showed last counts.
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in output.replace("\r\n", "\n").rstrip().split("\n")]
    lines = [without_torchs_prefix(line) for line in lines]
    if traceback:
        return _trimmed(_without(traceback, lines))[-BESIDE_TRACEBACK:]
    lines = _trimmed(lines)[-LINES:]
    starts = [index for index, line in enumerate(lines) if line.startswith(_DUMPS)]
    return lines[starts[0] if starts else 0 :]


def _trimmed(lines: list[str]) -> list[str]:
    said = [index for index, line in enumerate(lines) if line]
    return lines[said[0] : said[-1] + 1] if said else []


def _without(traceback: str, lines: list[str]) -> list[str]:
    """The lines but for the last printing of this traceback: from the heading to the text of the exception.

    Python may have printed more frames of it than were reported, so its ends are compared and not the whole.
    """
    reported = [line.rstrip() for line in traceback.rstrip().split("\n")]
    headings = sum(line.startswith(_TRACEBACKS) for line in reported)
    ends = [index for index, line in enumerate(lines) if line == reported[-1]]
    starts = [index for index, line in enumerate(lines) if ends and index < ends[-1] and line.startswith(_TRACEBACKS)]
    if not starts or not headings:
        return lines
    return lines[: starts[-headings:][0]] + lines[ends[-1] + 1 :]


def _output(each: RankOutcome, tails: Mapping[int, str] | None) -> list[str]:
    ended_of_it = each.kind in (OutcomeKind.ERROR, OutcomeKind.DERIVED)  # else its traceback is of something before
    return last_lines((tails or {}).get(each.rank) or each.output, each.traceback if ended_of_it else "")


def _headline(diagnosis: Diagnosis) -> str:
    cause = diagnosis.cause
    if cause.kind is OutcomeKind.NODE_LOST:
        return f"a node of its {diagnosis.world_size} ranks was lost"
    if cause.kind is OutcomeKind.SERVICE_LOST:
        return "the link to the head was lost"
    if cause.kind is OutcomeKind.HANG:
        behind = [cause.rank, *(each.rank for each in diagnosis.others if each.kind is OutcomeKind.HANG)]
        return f"{_ranks(behind)} of {diagnosis.world_size} made no progress"
    first = "left first" if cause.kind is OutcomeKind.EARLY else "failed first"
    return f"rank {cause.rank} of {diagnosis.world_size} {first}"


def _place(each: RankOutcome) -> str:
    who = [f"rank {each.rank}" + (f" on {each.host}" if each.host else "")]
    who += [f"pid {each.pid}"] if each.pid else []
    who += [f"device {each.device}"] if each.device else []
    where = [f"epoch {each.epoch}, iteration {each.iteration}"] if each.epoch or each.iteration else []
    where += [f"section {each.section}"] if each.section else []
    where += [f"waiting in {each.waiting}"] if each.waiting else []
    if where and each.kind in _SILENT and not (each.traceback or each.stacks):
        return f"{', '.join(who)}; its last heartbeat: {', '.join(where)}"
    return ", ".join(who + where)


def _stacks(diagnosis: Diagnosis) -> list[str]:
    lines: list[str] = []
    hanging = [
        each
        for each in (diagnosis.cause, *diagnosis.others)
        if each.kind is OutcomeKind.HANG and (each.stacks or each.trace)
    ]
    waiting = [each for each in diagnosis.others if each.kind is not OutcomeKind.HANG and each.stacks][:1]
    for each in (*hanging[:_STACKS], *(waiting if hanging else ())):
        role = "stack" if each.kind is OutcomeKind.HANG else "stack, as one that waits"
        if each.stacks:
            lines.append(f"  rank {each.rank}'s {role} (most recent call first):")
            lines += [f"  {line}" for line in set_off(_without_heading(main_thread(each.stacks)))[:_FRAMES]]
        lines += [f"    its collective on record: {line}" for line in each.trace.splitlines()]
    return lines


def _without_heading(stack: str) -> str:
    heading, _, frames = stack.partition("\n")
    return frames if "most recent call first" in heading else stack


def _further(diagnosis: Diagnosis) -> list[RankOutcome]:
    """The first exceptions that say something else than the cause does."""
    # A bug shows on many ranks with one text; another text may be another bug.
    different: dict[str, RankOutcome] = {diagnosis.cause.what: diagnosis.cause}
    for each in diagnosis.others:
        if each.kind is OutcomeKind.ERROR and len(different) <= _ALSO:
            different.setdefault(each.what, each)
    return list(different.values())[1:]


def _others(diagnosis: Diagnosis) -> list[str]:
    # Thousands of ranks mostly end alike, and one line says so for all of them.
    alike: dict[str, list[int]] = {}
    for each in sorted(diagnosis.others, key=lambda each: each.rank):
        if each.kind in _FAILED_TOO or each.kind is OutcomeKind.DERIVED:
            how = f"failed {'because of that' if each.kind is OutcomeKind.DERIVED else 'too'}, {each.what}"
        elif each.kind is OutcomeKind.SEEN:
            how = f"had seen {each.what} leave a run, and had not ended of it"
        elif each.kind is OutcomeKind.RUNNING and each.waiting:
            how = f"waited in {each.waiting}"
        elif each.kind is OutcomeKind.KILLED and each.note:
            how = f"{each.what}; {each.note}"
        else:
            how = each.what
        alike.setdefault(how, []).append(each.rank)
    lines = [f"{_ranks(ranks)}: {how}" for how, ranks in alike.items()]
    if len(lines) <= _GROUPS:
        return lines
    rest = [rank for ranks in list(alike.values())[_GROUPS:] for rank in ranks]
    return [*lines[:_GROUPS], f"{_ranks(rest)}: see the report's file"]


def _ranks(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {spans(ranks)}"


def _cut(text: str) -> str:
    lines = text.rstrip().splitlines()
    if len(lines) <= 2 * _FRAMES:
        return text
    return "\n".join((*lines[:_FRAMES], f"  ... {len(lines) - 2 * _FRAMES} lines left out", *lines[-_FRAMES:]))
