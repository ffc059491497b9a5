"""A fault plan is a value that travels as text, and a wrong text is refused with one clear error."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allstep.errors import ConfigurationError, DataError
from allstep.faults import RankPosition
from allstep.faults.fault import Raised
from allstep.testing import FaultPlan

PLANS = [
    (FaultPlan.at(rank=1, iteration=7).kill(9), "rank=1,iteration=7,kill=9"),
    (FaultPlan.at(rank=1, iteration=7).raise_(ValueError("x")), "rank=1,iteration=7,raise=ValueError:x"),
    (FaultPlan.at(rank=0).raise_(KeyError()), "rank=0,raise=KeyError"),
    (FaultPlan.at(2, 3).raise_(DataError("a, b")), "rank=2,iteration=3,raise=allstep.errors.DataError:a%2C b"),
    (FaultPlan.at(iteration=2).freeze(), "iteration=2,freeze"),
    (FaultPlan.at(1, 2).hold_gil(1.5), "rank=1,iteration=2,hold_gil=1.5"),
    (FaultPlan.at(1, 2, attempt=0).exit(3), "rank=1,iteration=2,attempt=0,exit=3"),
    (FaultPlan.at(1, attempt=range(3), when="start").sleep(2), "rank=1,attempt=0-2,when=start,sleep=2.0"),
    (FaultPlan.at(1, epoch=2, when="data").slow(0.25), "rank=1,epoch=2,when=data,slow=0.25"),
    (FaultPlan.at(1, 2).segfault(), "rank=1,iteration=2,segfault"),
    (FaultPlan.at(1, 2, when="handler").abort(), "rank=1,iteration=2,when=handler,abort"),
    (FaultPlan.at(1, 2).fill_disk("/a;b"), "rank=1,iteration=2,fill_disk=/a%3Bb"),
    (FaultPlan.at(1, 2).allocate(2**20), "rank=1,iteration=2,allocate=1048576"),
    (FaultPlan.at(1, when="start").ignore(signal.SIGTERM), "rank=1,when=start,ignore=SIGTERM"),
    (FaultPlan.at(1, 2).nan(), "rank=1,iteration=2,nan"),
    (FaultPlan.at(1, 2).leave(), "rank=1,iteration=2,leave"),
    (
        FaultPlan.at(0, 3).kill(9) + FaultPlan.at(1, when="exit").sleep(5),
        "rank=0,iteration=3,kill=9;rank=1,when=exit,sleep=5.0",
    ),
    (FaultPlan(), ""),
]


@pytest.mark.parametrize(("plan", "text"), PLANS, ids=[text for _, text in PLANS])
def test_a_plan_is_written_as_text_and_read_back(plan: FaultPlan, text: str) -> None:
    assert plan.to_text() == text
    assert FaultPlan.parse(text) == plan
    assert FaultPlan.from_environ(plan.to_environ()) == plan


@given(st.text())
def test_any_message_survives_the_way_through_text(message: str) -> None:
    encodable = message.encode(errors="replace").decode()
    plan = FaultPlan.at(1, 2).raise_(ValueError(encodable)) + FaultPlan.at(0).kill(9)
    read = FaultPlan.parse(plan.to_text())
    assert read.faults[0].argument == Raised("ValueError", encodable)
    assert len(read.faults) == 2


@given(st.text(alphabet="rankiterofzps0123456789=,;:-_ killexit%", max_size=40))
def test_a_text_is_read_or_refused_with_a_configuration_error(text: str) -> None:
    try:
        plan = FaultPlan.parse(text)
    except ConfigurationError:
        return
    assert FaultPlan.parse(plan.to_text()) == plan


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("rank=1,iteraton=7,kill=9", ["'iteraton=7'", "iteration=N", "kill=9"]),
        ("rank=one,kill=9", ["'rank=one'", "a number, or all"]),
        ("rank=1,rank=2,kill=9", ["'rank=2'", "twice"]),
        ("rank=1,iteration=7", ["one thing", "says none", "hold_gil=60"]),
        ("rank=1,kill=9,freeze", ["says kill and freeze"]),
        ("rank=1,kill=900", ["'kill=900'", "a signal such as 9 or SIGKILL"]),
        ("rank=1,kill", ["'kill'", "as in kill=9"]),
        ("rank=1,freeze=3", ["'freeze=3'", "takes no value"]),
        ("rank=1,sleep=-1", ["'sleep=-1'", "seconds"]),
        ("rank=1,sleep=nan", ["'sleep=nan'", "seconds"]),
        ("rank=1,exit=256", ["'exit=256'", "0 to 255"]),
        ("rank=1,raise=NoError:x", ["'raise=NoError:x'", "ValueError:message"]),
        ("rank=1,allocate=3X", ["'allocate=3X'", "2G"]),
        ("rank=1,when=later,kill=9", ["'when=later'", "start, data, step, handler, exit"]),
        ("rank=1,attempt=2-1,kill=9", ["attempt is 2-1"]),
        ("iteration=0,kill=9", ["iteration is 0"]),
        ("rank=1,when=start,iteration=2,kill=9", ["'start'", "leave them out"]),
        ("rank=1,when=exit,leave", ["leave can strike when=data or step or handler"]),
        ("rank=1,when=data,nan", ["nan can strike when=step"]),
        ("rank=0,kill=9;rank=1,oops", ["fault 'rank=1,oops'"]),
    ],
)
def test_a_wrong_text_is_refused_naming_the_part_and_what_is_allowed(text: str, names: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        FaultPlan.from_environ({"ALLSTEP_FAULT": text})
    for name in ["ALLSTEP_FAULT", *names]:
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_exception_that_text_cannot_carry_is_refused_when_the_plan_is_made() -> None:
    class Local(Exception):
        pass

    with pytest.raises(ConfigurationError, match="top level"):
        FaultPlan.at(1).raise_(Local("x"))
    with pytest.raises(ConfigurationError, match="one text"):
        FaultPlan.at(1).raise_(ValueError("x", 3))


def test_a_signal_that_there_is_not_is_refused_when_the_plan_is_made() -> None:
    with pytest.raises(ConfigurationError, match="signal is 900"):
        FaultPlan.at(1).kill(900)
    with pytest.raises(ConfigurationError, match="signal is 900"):
        FaultPlan.at(1).ignore(900)


def strikes(text: str, position: RankPosition) -> bool:
    return FaultPlan.parse(text).faults[0].strikes(position)


def test_a_fault_strikes_where_everything_it_names_holds() -> None:
    position = RankPosition("step", rank=1, attempt=1, epoch=2, iteration=7)
    assert strikes("kill=9", position)
    assert strikes("rank=1,iteration=7,epoch=2,attempt=0-1,kill=9", position)
    assert strikes("rank=all,iteration=7,kill=9", position)
    for elsewhere in ("rank=0", "iteration=6", "epoch=1", "attempt=0", "attempt=2-3", "when=data", "when=exit"):
        assert not strikes(f"{elsewhere},kill=9", position)


def test_a_fault_that_repeats_strikes_from_its_iteration_on() -> None:
    struck = [
        number for number in range(1, 6) if strikes("iteration=3,slow=1", RankPosition("step", 0, iteration=number))
    ]
    assert struck == [3, 4, 5]
