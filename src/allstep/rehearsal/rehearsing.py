"""The course of a rehearsal: interrupt a run, let it go on, run it unbroken, and compare.

Contract: `rehearse` returns when nothing that it started is left, with a report; it raises only where nothing could be
started or a checkpoint cannot be read. In order:
1. The script is started. Once it stands after `interrupted_after`, it gets what the cluster would send.
2. It is started again as the cluster would, up to an iteration that is as far behind the saved place as `iterations` is
   behind the interruption. `judge` and `another_start` decide whether `allstep submit` would put the job back.
3. It is run unbroken, by itself, up to the same iteration; at another number of ranks, on that number too.
4. The last checkpoints are compared. Where they differ and the traces do not tell why, it is run unbroken once more, to
   see whether it is the same twice.
The interruption comes first because only then is it known how far the runs have to go.

How near is near enough at another number of ranks: sums over others are rounded otherwise, so bits differ. An unbroken
run at the second number is compared with the one at the first. The interrupted run may be `_FACTOR` times as far away.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from allstep.exit_codes import PREEMPTED
from allstep.rehearsal.interruption import (
    SentSignal,
    is_restarted_inside,
    job_variables,
    measures_saves,
    signals_of,
)
from allstep.rehearsal.iteration_trace import RunTrace, first_parting, read_traces
from allstep.rehearsal.one_start import PlannedStart, StartEnd, run_start
from allstep.rehearsal.probable_causes import Evidence, is_explained, probable_causes
from allstep.rehearsal.rehearsal_report import Comparison, RehearsalReport, StartSummary, Verdict
from allstep.rehearsal.rehearsal_request import RehearsalRequest
from allstep.rehearsal.tensor_comparison import compare_runs, newest
from allstep.run_record.run_folders import PRIVATE, default_name
from allstep.submission.batch_process import StopNotice, judge
from allstep.submission.job_record import JobRecord, another_start
from allstep.submission.lead_time import MARGIN_S, lead_seconds

_FACTOR = 4.0
_OUTPUT = 4000  # characters


def rehearse(request: RehearsalRequest, say: Callable[[str], None] = lambda line: None) -> RehearsalReport:
    """Rehearse, and say what came of it.

    Args:
        request: what and how.
        say: told in a line what is done next.

    Raises:
        CheckpointError: a checkpoint of the rehearsal cannot be read.
        OSError: the rehearsal's folder cannot be made.
    """
    stem = f"rehearse-{default_name(request.target, time.strftime('%Y%m%d-%H%M%S'))}"
    request.runs.mkdir(parents=True, exist_ok=True)
    folder, number = request.runs / stem, 1
    while True:
        try:
            folder.mkdir(mode=PRIVATE)
            break
        except FileExistsError:  # another rehearsal of this second
            number += 1
            folder = request.runs / f"{stem}-{number}"
    rehearsal = _Rehearsed(request, folder.resolve(), say)
    report = rehearsal.run()
    if report.is_good and not request.keep:
        shutil.rmtree(folder, ignore_errors=True)
        return report
    return replace(report, folder=str(folder))


@dataclass(slots=True)
class _Rehearsed:
    """A rehearsal under way."""

    request: RehearsalRequest
    folder: Path
    say: Callable[[str], None]
    lead: float = 0.0
    saved_at_notice: int = -1
    starts: list[StartSummary] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    end: int = 0

    @property
    def interrupted(self) -> Path:
        """The folder of the interrupted run."""
        return self.folder / "interrupted"

    @property
    def record(self) -> JobRecord:
        """Of the interrupted run's starts and saves."""
        return JobRecord(self.interrupted)

    def run(self) -> RehearsalReport:
        """From the first start to the report."""
        request = self.request
        self.end = request.iterations
        inside = is_restarted_inside(request.kind, other_size=request.ranks_after != request.ranks)
        self.interrupted.mkdir()
        self.record.begin("rehearsal", 1)
        place = f"after iteration {request.interrupted_after}"
        self.say(f"{request.ranks} ranks, interrupted {place} ({request.kind})")
        first = run_start(
            request,
            PlannedStart(
                self.interrupted,
                0,
                request.ranks,
                last=self.end if inside else None,
                variables=job_variables(request.kind, 0),
                measures=measures_saves(request.kind),
                meet_at=request.interrupted_after,
                restarts=int(inside),
            ),
            self._signals,
        )
        trace = read_traces(self.interrupted, 0)
        saved = self._saved_in(trace, inside)
        told = request.kind != "failure"
        evidence = Evidence(trace, saved=saved, stopped=first.code == PREEMPTED, told=told)
        self._note_first(first, trace, saved, inside)
        if not first.reached_at:
            early = first.code == 0
            return self._report("finished early" if early else "failed", failed=None if early else first)
        if not inside and first.code == 0:
            return self._report("finished early")
        if not inside and (refusal := self._refusal(first)) is not None:
            self.notes.append(refusal)
            return self._report("failed", evidence, failed=first)
        return self._compare(evidence, self._go_on(first, saved, inside))

    # The interrupted run

    def _signals(self) -> tuple[SentSignal, ...]:
        """What the cluster sends, now that the run stands at its place."""
        request, saves = self.request, self.record.saves()
        self.lead = lead_seconds(saves, MARGIN_S) if request.lead is None else request.lead
        self.saved_at_notice = self.record.saved()
        return signals_of(request.kind, lead=self.lead, kill_wait=request.kill_wait, rank=request.failing_rank)

    def _saved_in(self, trace: RunTrace, inside: bool) -> int | None:
        """What was saved last when the first start ended.

        The record alone does not tell: a kill may come between a save and its line there.
        """
        if inside:  # the restart has saved since, so that what it went on from tells what was there
            steps = [each.step for each in self.record.saves() if each.run == trace.main.pid]
            steps.append(read_traces(self.interrupted, 1).went_on_at or 0)
        else:
            steps = [each.step for each in self.record.saves()]
            steps += [entry.manifest.step for entry in newest(self.interrupted).values() if entry.manifest is not None]
        return max(steps, default=0) or None

    def _note_first(self, end: StartEnd, trace: RunTrace, saved: int | None, inside: bool) -> None:
        sent = [each.number.name for each in end.sent]
        if not end.reached_at:
            said = "ended before its place"
        elif inside:
            said = f"rank {self.request.failing_rank} killed"
        elif end.code == PREEMPTED:
            said = f"stopped {end.seconds:.1f} s after {sent[0]}"
        else:
            said = f"ended by {sent[-1]}" if end.code else "went on to its own end"
        code = 128 + signal.SIGKILL if inside and end.reached_at else end.code
        self.starts.append(StartSummary(self.request.ranks, trace.went_on_at, trace.reached, saved, code, said))
        if end.sent and end.sent[0].number == signal.SIGUSR1:
            self.notes.append(f"{self.lead:.1f} s between the notice and the end of the job")
        is_told = self.request.kind != "failure" and end.reached_at
        if is_told and end.code not in (0, PREEMPTED) and saved is not None and trace.reached > saved:
            self.notes.append(
                f"{trace.reached - saved} iterations were lost, since the run did not stop when it was told to; attach "
                "allstep.Preemption beside the Checkpoint"
            )

    def _refusal(self, end: StartEnd) -> str | None:
        """Why the job would not be put back into its queue, where it is the job that decides."""
        if self.request.kind != "requeue":
            return None
        saved = self.record.saved()
        if judge(end.code, StopNotice(used_up=False, saved=self.saved_at_notice), saved) != "stopped":
            return f"allstep submit takes this end (exit code {end.code}) for a failure, and does not requeue the job"
        refusal = another_start(self.record.starts(), saved, used_up=False)
        return None if refusal is None else f"allstep submit would not requeue the job: {refusal}"

    def _go_on(self, first: StartEnd, saved: int | None, inside: bool) -> StartEnd:
        """Start it again, where that has not happened yet, and say how it ended."""
        request = self.request
        if inside:
            end = first
        else:
            self.end = max(self.end, (saved or 0) + request.iterations - request.interrupted_after)
            self.say(f"{request.ranks_after} ranks, on from there to iteration {self.end}")
            end = run_start(
                request,
                PlannedStart(
                    self.interrupted,
                    1,
                    request.ranks_after,
                    last=self.end,
                    variables=job_variables(request.kind, 1),
                ),
            )
        trace = read_traces(self.interrupted, 1)
        saved_now = max((each.step for each in self.record.saves() if each.run == trace.main.pid), default=None)
        said = "killed, since it took too long" if end.timed_out else "ended"
        self.starts.append(
            StartSummary(request.ranks_after, trace.went_on_at, trace.reached, saved_now, end.code, said)
        )
        return end

    # The comparison

    def _compare(self, evidence: Evidence, second: StartEnd) -> RehearsalReport:
        request = self.request
        evidence = replace(evidence, second=read_traces(self.interrupted, 1))
        if second.code != 0:
            return self._report("failed", evidence, failed=second)
        unbroken = self._run_whole("unbroken", request.ranks)
        if unbroken.code != 0:
            self.notes.append("it is the unbroken run that failed")
            return self._report("failed", failed=unbroken)
        evidence = replace(evidence, unbroken=read_traces(self.folder / "unbroken", 0))
        comparison = compare_runs(self.folder / "unbroken", self.interrupted)
        evidence = replace(evidence, objects=() if comparison is None else comparison.objects)
        went_on = evidence.second.went_on_at
        if evidence.saved is None or went_on is None or went_on < evidence.saved:
            return self._report("began anew", evidence, comparison)
        if comparison is not None and comparison.is_exact:
            return self._report("exact", None, comparison)
        if comparison is not None and request.ranks_after != request.ranks:
            ended = self._run_whole("other-size", request.ranks_after)
            if ended.code != 0:
                self.notes.append(f"it is the unbroken run on {request.ranks_after} ranks that failed")
                return self._report("failed", failed=ended)
            evidence = replace(evidence, other_size=read_traces(self.folder / "other-size", 0))
            drift = compare_runs(self.folder / "unbroken", self.folder / "other-size")
            if drift is not None:
                self.notes.append(
                    f"unbroken runs on {request.ranks} and {request.ranks_after} ranks differ by {drift.relative:.1e} "
                    "of the largest value, since sums are rounded otherwise"
                )
            if drift is not None and comparison.relative <= _FACTOR * drift.relative and _is_rounding(evidence):
                return self._report("close", None, comparison)
        elif not is_explained(evidence):
            self._run_whole("again", request.ranks)
            evidence = replace(evidence, again=read_traces(self.folder / "again", 0))
        return self._report("differs", evidence, comparison)

    def _run_whole(self, name: str, ranks: int) -> StartEnd:
        """Run the script without an interruption."""
        self.say(f"{ranks} ranks, {name.replace('-', ' ')}, to iteration {self.end}")
        return run_start(self.request, PlannedStart(self.folder / name, 0, ranks, last=self.end))

    def _report(
        self,
        verdict: Verdict,
        evidence: Evidence | None = None,
        comparison: Comparison | None = None,
        *,
        failed: StartEnd | None = None,
    ) -> RehearsalReport:
        """The report; `evidence` where there is a reason to look for."""
        parting = None
        if evidence is not None and verdict == "differs":
            other_size = bool(evidence.other_size.ranks)
            part = partial(first_parting, evidence.unbroken)
            pairs = [part(evidence.first), part(evidence.second, other_size=other_size)]
            parting = min(filter(None, pairs), key=lambda each: each.iteration, default=None)
        return RehearsalReport(
            kind=self.request.kind,
            script=" ".join([self.request.target, *self.request.arguments]),
            verdict=verdict,
            starts=tuple(self.starts),
            iterations=self.end,
            comparison=comparison,
            parting=parting,
            causes=() if evidence is None else self._causes(verdict, evidence),
            notes=tuple(self.notes),
            output="" if failed is None else failed.output.read_text(errors="replace")[-_OUTPUT:],
        )

    def _causes(self, verdict: Verdict, evidence: Evidence) -> tuple[str, ...]:
        found = probable_causes(evidence)
        # Why a start failed, its own words say; what is known of saving may be the reason all the same.
        return found if verdict != "failed" or evidence.saved is None else ()


def _is_rounding(evidence: Evidence) -> bool:
    """Whether runs at two sizes take the same samples, so that what differs is rounding alone."""
    return first_parting(evidence.unbroken, evidence.other_size, other_size=True) is None
