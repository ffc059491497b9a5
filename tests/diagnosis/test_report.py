"""The report as a person reads it, and as a program does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from allstep.diagnosis.rank_outcome import OutcomeKind, RankOutcome
from allstep.diagnosis.report import failure_json, failure_text, last_lines
from allstep.diagnosis.root_cause import Diagnosis
from allstep.diagnosis.stacks import set_off

TRACEBACK = """Traceback (most recent call last):
  File "/home/me/train.py", line 30, in main
    trainer.run(loader)
  File "/venv/lib/python3.11/site-packages/allstep/engine/engine.py", line 200, in run
    self._loop()
  File "/home/me/train.py", line 12, in train_step
    raise ValueError("bad batch")
ValueError: bad batch
"""
CAUSE = RankOutcome(
    1, OutcomeKind.ERROR, "ValueError: bad batch", 1, 1, "node7", 4711, "cuda:1", 2, 7, "step", traceback=TRACEBACK
)
PEER = RankOutcome(
    0, OutcomeKind.DERIVED, "RuntimeError: Connection closed by peer", 1, 2, "node7", 4710, traceback="Traceback..."
)
CASE = Diagnosis(CAUSE, (PEER, RankOutcome(2, OutcomeKind.ORDERED, "left when it was told to", 84)), 3, 0)


def test_a_rank_that_was_killed_and_whose_process_does_not_end_is_said_to_be():
    stuck = RankOutcome(2, OutcomeKind.KILLED, "was killed by allstep", 84, note="its process does not end")
    assert "  rank 2: was killed by allstep; its process does not end\n" in failure_text(replace(CASE, others=(stuck,)))


def test_the_cause_comes_first_with_its_place_and_traceback():
    lines = failure_text(CASE, name="digits").splitlines()
    assert lines[0] == "run digits failed: rank 1 of 3 failed first"
    assert lines[1].strip() == "ValueError: bad batch"
    assert lines[2].strip() == "rank 1 on node7, pid 4711, device cuda:1, epoch 2, iteration 7, section step"
    assert "Traceback" in lines[3]


def test_the_users_frames_are_set_off_from_the_librarys():
    marked = [line for line in failure_text(CASE).splitlines() if line.strip().startswith(">")]
    assert [line.strip(" >") for line in marked] == [
        'File "/home/me/train.py", line 30, in main',
        "trainer.run(loader)",
        'File "/home/me/train.py", line 12, in train_step',
        'raise ValueError("bad batch")',
    ]


@pytest.mark.parametrize(
    ("file", "users"),
    [
        ("train.py", True),
        ("/home/me/allstep_project/train.py", True),
        ("/home/me/torch_models/net.py", True),
        ("/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", False),
        ("/usr/lib/python3.12/threading.py", False),
        ("/usr/lib/python3/dist-packages/numpy/core.py", False),
        ("<frozen runpy>", False),
        ("/home/me/src/allstep/engine/loop.py", False),
    ],
)
def test_whose_frame_it_is_shows_in_its_file(file, users):
    line = set_off(f'  File "{file}", line 1, in f')[0]
    assert line.startswith(">") == users


def test_others_are_one_line_each_and_alike_ones_share_it():
    others = tuple(replace(PEER, rank=rank) for rank in (0, 2, 3))
    lines = failure_text(Diagnosis(CAUSE, others, 4, 0)).splitlines()
    assert lines[-1].strip() == ("ranks 0, 2-3: failed because of that, RuntimeError: Connection closed by peer")
    assert len([line for line in lines if "because of that" in line]) == 1


def test_two_failures_are_both_shown():
    second = replace(CAUSE, rank=0, what="KeyError: 'x'", traceback=TRACEBACK.replace("ValueError", "KeyError"))
    text = failure_text(Diagnosis(CAUSE, (second,), 2, 0))
    assert text.index("ValueError: bad batch") < text.index("rank 0 failed too: KeyError: 'x'")
    assert text.count("train_step") == 2


def test_thousands_of_different_failures_are_a_short_report():
    others = tuple(replace(CAUSE, rank=rank, what=f"ValueError: batch of rank {rank}") for rank in range(2, 4096))
    lines = failure_text(Diagnosis(CAUSE, others, 4096, 0)).splitlines()
    assert len(lines) < 100
    assert "rank 2 failed too" in "".join(lines)


def test_a_death_by_signal_shows_the_last_output_and_the_supervisors_note():
    killed = RankOutcome(1, OutcomeKind.SIGNAL, "killed by SIGKILL (exit code 137)", 137, note="likely out of memory")
    text = failure_text(
        Diagnosis(killed, (PEER,), 2, 0), tails={1: "loading\nstep 7\n"}, logs={1: Path("/runs/r1.log")}
    )
    assert "likely out of memory" in text
    assert "    step 7\n" in text
    assert "its whole output: /runs/r1.log" in text


def test_the_same_traceback_is_not_shown_twice():
    text = failure_text(CASE, tails={1: "step 6\n" + TRACEBACK})
    assert text.count("in train_step") == 1
    assert "  its last lines of output:\n    step 6\n" in text


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (f"step 6\n{TRACEBACK}", ["step 6"]),
        (f"{TRACEBACK}flushed at the end\n", ["flushed at the end"]),
        (f"step 6\n{TRACEBACK}leaked semaphore\n", ["step 6", "leaked semaphore"]),
        # Python prints frames that had not been left when the failure was reported, and torch puts a prefix
        (f"step 6\n{TRACEBACK}".replace("last):\n", 'last):\n  File "train.py", line 40, in <module>\n'), ["step 6"]),
        ("step 6\n" + "".join(f"[rank1]: {line}\n" for line in TRACEBACK.splitlines()), ["step 6"]),
        (f"step 6\n{TRACEBACK}".replace("\n", "\r\n"), ["step 6"]),
        # one that was caught and printed before
        (
            f"Traceback (most recent call last):\nKeyError: 3\n{TRACEBACK}",
            ["Traceback (most recent call last):", "KeyError: 3"],
        ),
        (TRACEBACK, []),
    ],
)
def test_the_last_lines_of_output_are_shown_beside_the_traceback(written, shown):
    assert last_lines(written, TRACEBACK) == shown


def test_a_chain_of_exceptions_is_left_out_as_a_whole():
    chain = f"KeyError: 'x'\n\nDuring handling of the above exception, another exception occurred:\n\n{TRACEBACK}"
    chain = f'Traceback (most recent call last):\n  File "train.py", line 3, in f\n{chain}'
    assert last_lines(f"step 6\n{chain}", chain) == ["step 6"]


def test_what_was_written_in_another_form_than_pythons_is_shown():
    assert last_lines("+--- Error ---+\n| ValueError: bad batch |", TRACEBACK)[-1] == "| ValueError: bad batch |"


def test_beside_a_traceback_few_lines_are_shown():
    assert last_lines("step\n" * 40 + TRACEBACK, TRACEBACK) == ["step"] * 15


def test_a_hang_names_who_is_behind_with_stacks_and_collectives():
    stack = 'Thread 0x1 (most recent call first):\n  File "/home/me/data.py", line 3 in read\n'
    hung = RankOutcome(
        1,
        OutcomeKind.HANG,
        "hangs in section data",
        83,
        section="data",
        stacks=stack,
        trace="all_reduce #12: scheduled",
    )
    waits = RankOutcome(0, OutcomeKind.RUNNING, "had not failed", 0, waiting="gradients")
    text = failure_text(Diagnosis(hung, (waits,), 2, 0, explanation="rank 0 waits in gradients"))
    assert "rank 1 of 2 made no progress" in text
    assert '>   File "/home/me/data.py", line 3 in read' in text
    assert "all_reduce #12: scheduled" in text
    assert "rank 0: waited in gradients" in text
    assert "rank 0 waits in gradients" in text


def test_slow_ranks_are_named():
    assert "rank 2 is slow: its own part of a step takes 1.8 times" in failure_text(replace(CASE, slow=((2, 1.8),)))


def test_a_hang_of_thousands_of_ranks_is_a_short_report():
    others = tuple(
        RankOutcome(rank, OutcomeKind.RUNNING, "had not failed", 0, waiting="gradients") for rank in range(4095)
    )
    hung = RankOutcome(
        4095,
        OutcomeKind.HANG,
        "hangs",
        83,
        stacks="Thread 0x1 (most recent call first):\n" + '  File "a", line 1 in f\n' * 500,
    )
    assert len(failure_text(Diagnosis(hung, others, 4096, 0)).splitlines()) < 100


def test_json_holds_the_same():
    content = json.loads(json.dumps(failure_json(CASE, name="digits", tails={1: "the end\n"})))
    assert content["run"] == "digits"
    assert content["exit_code"] == 1
    assert content["cause"]["traceback"] == TRACEBACK
    assert content["cause"]["output"] == "the end"
    assert [each["rank"] for each in content["others"]] == [0, 2]
    assert content["others"][0]["kind"] == "derived"


def test_only_the_last_traceback_of_an_output_is_repeated():
    assert last_lines("a\r\nb\n[rank1]: Traceback (most recent call last):\n[rank1]: ValueError: x\n") == [
        "Traceback (most recent call last):",
        "ValueError: x",
    ]
    assert last_lines("10%\r20%\r30%\n") == ["30%"]
    assert last_lines("\n") == []
