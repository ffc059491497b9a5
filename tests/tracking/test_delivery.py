"""How records reach a tool: once, in order, however often the tool or the process fails."""

from __future__ import annotations

import json
import threading

import pytest

from allstep.tracking.delivery import Delivery
from allstep.tracking.journal import Journal
from allstep.tracking.values import Record


class Plain:
    """A tool that keeps what it is given."""

    def __init__(self, kept=None):
        self.kept = [] if kept is None else kept
        self.fails = 0

    def log(self, values, step):
        if self.fails:
            self.fails -= 1
            raise ConnectionError("server down")
        self.kept.append((step, values["x"]))

    def state_dict(self):
        return {"run": "a"}

    def load_state_dict(self, state):
        self.loaded = state


class Withdrawing(Plain):
    def withdraw(self, step):
        self.kept[:] = [each for each in self.kept if each[0] < step]


class Restarting(Plain):
    def restart(self):
        self.kept.clear()


def journal_with(folder, steps):
    journal = Journal(folder)
    journal.append([Record(step, 1, 0.0, {"x": step}) for step in steps])
    return journal


def deliver(journal, tool, most_s=20):
    delivery = Delivery("tool", tool, journal)
    assert delivery.close(most_s) == 0


def position(folder, **changes):
    """Write down where a killed process had been."""
    given = {"begun": 0, "done": 0, "cuts": 0, "identity": {"run": "a"}, **changes}
    (folder / "tool.json").write_text(json.dumps(given))


def test_each_start_goes_on_where_the_one_before_ended(tmp_path):
    kept = []
    for steps in ([1, 2, 2], [3], []):
        deliver(journal_with(tmp_path, steps), Plain(kept))
    assert kept == [(1, 1), (2, 2), (2, 2), (3, 3)]


@pytest.mark.parametrize("kind", [Withdrawing, Restarting])
@pytest.mark.parametrize("arrived", [2, 3, 4])
def test_what_a_kill_left_unsure_is_there_once(kind, arrived, tmp_path):
    journal = journal_with(tmp_path, [1, 2, 2, 3])
    position(tmp_path, begun=4, done=2)
    kept = [(1, 1), (2, 2), (2, 2), (3, 3)][:arrived]
    deliver(journal, kind(kept))
    assert kept == [(1, 1), (2, 2), (2, 2), (3, 3)]


@pytest.mark.parametrize("kind", [Withdrawing, Restarting])
def test_what_is_behind_the_checkpoint_is_taken_back(kind, tmp_path):
    journal = journal_with(tmp_path, [1, 2, 3, 4])
    position(tmp_path, begun=4, done=4)
    kept = [(step, step) for step in (1, 2, 3, 4)]
    journal.cut(2)
    journal.append([Record(step, 1, 0.0, {"x": step * 10}) for step in (3, 4, 5)])
    deliver(Journal(tmp_path), kind(kept))
    assert kept == [(1, 1), (2, 2), (3, 30), (4, 40), (5, 50)]


def test_a_cut_while_a_tool_is_served_is_seen(tmp_path):
    journal, tool = journal_with(tmp_path, [1, 2, 3]), Withdrawing()
    delivery = Delivery("tool", tool, journal)
    assert delivery.wait(20) == 0
    journal.cut(1)
    journal.append([Record(2, 1, 0.0, {"x": 20})])
    delivery.wake()
    assert delivery.wait(20) == 0
    assert tool.kept == [(1, 1), (2, 20)]
    delivery.close(20)


def test_a_tool_that_fails_is_tried_again_with_one_warning(tmp_path, caplog):
    tool = Withdrawing()
    tool.fails = 2
    delivery = Delivery("tool", tool, journal_with(tmp_path, [1, 2]))
    assert delivery.wait(30) == 0
    delivery.close(20)
    assert tool.kept == [(1, 1), (2, 2)]
    assert caplog.text.count("tool does not take values (ConnectionError: server down); training goes on") == 1
    assert caplog.text.count("tool takes values again") == 1


def test_a_tool_that_hangs_keeps_nobody_and_is_served_by_the_next_start(tmp_path):
    gate = threading.Event()

    class Hanging(Plain):
        def log(self, values, step):
            gate.wait()

    delivery = Delivery("tool", Hanging(), journal_with(tmp_path, [1, 2]))
    assert delivery.wait(0.2) == 2
    assert delivery.close(0.2) == 2
    tool = Withdrawing()
    deliver(Journal(tmp_path), tool)
    assert tool.kept == [(1, 1), (2, 2)]
    gate.set()


def test_the_run_of_a_tool_is_gone_on_with(tmp_path):
    deliver(journal_with(tmp_path, [1]), Plain())
    tool = Plain()
    deliver(journal_with(tmp_path, [2]), tool)
    assert tool.loaded == {"run": "a"}
