"""Which tests hold each row of the fault matrix; this one holds that they exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.jobs.launchers import ROOT

FAULTS = "tests/faults/"
CHECKPOINT = "tests/checkpoint/"

ELSEWHERE: dict[int | str, list[str]] = {
    11: [f"{FAULTS}test_preemption.py::test_a_run_resumed_after_sigterm_to_all_equals_an_unbroken_one"],
    12: [f"{FAULTS}test_preemption.py::test_sigterm_to_one_rank_stops_all_together"],
    14: [f"{FAULTS}test_preemption.py::test_usr1_before_torch_is_imported_is_remembered"],
    16: ["tests/launch/test_restarts.py::test_a_run_that_fails_three_times_recovers_at_the_third_restart"],
    21: ["tests/launch/test_machines.py::test_strangers_on_the_port_are_turned_away_and_the_run_goes_on"],
    22: ["tests/hosts/test_hosts.py::test_row_22_a_link_that_is_cut_ends_both_sides_within_the_limit"],
    23: ["tests/faults/test_uneven_link.py::test_row_23_news_that_comes_late_and_in_bunches_ends_nobody"],
    35: [
        f"{FAULTS}test_divergence.py::test_a_rank_that_enters_a_collective_alone_is_named_with_its_line",
        f"{FAULTS}test_divergence.py::test_an_engine_that_runs_on_one_rank_only_is_named_with_the_remedy",
    ],
    38: [
        f"{CHECKPOINT}test_commit.py::test_a_disk_that_fills_up_while_writing_leaves_the_checkpoint_before",
        f"{CHECKPOINT}test_commit_ranks.py::test_a_rank_that_cannot_write_fails_the_save_on_all",
    ],
    39: [
        f"{CHECKPOINT}test_crash.py::test_killed_among_two_ranks_the_newest_committed_checkpoint_is_whole",
        f"{CHECKPOINT}test_commit_ranks.py::test_a_rank_that_dies_in_a_save_leaves_the_checkpoint_before",
    ],
    40: [f"{CHECKPOINT}test_selection.py::test_a_damaged_checkpoint_is_quarantined_and_the_one_before_it_used"],
    41: [
        f"{CHECKPOINT}test_selection_ranks.py::test_a_file_or_folder_that_appears_late_on_one_rank_is_waited_for",
        f"{CHECKPOINT}test_selection_ranks.py::test_what_one_rank_never_sees_may_be_whole_and_is_an_error",
    ],
    42: [f"{FAULTS}test_world_sizes.py::test_global_batches_are_those_of_the_unbroken_run"],
    43: [f"{FAULTS}test_saving_meanwhile.py::test_one_save_is_under_way_and_training_goes_on_to_the_same_end"],
    46: [
        "tests/slurm/test_requeue.py::test_a_job_that_gets_usr1_is_requeued_and_goes_on",
        "tests/slurm/test_failure.py::test_a_task_that_raises_is_the_cause_and_all_tasks_of_all_nodes_end",
        "tests/slurm/test_placement.py::test_a_batch_script_without_srun_is_a_world_of_one_with_a_warning",
    ],
    "A1": [f"{CHECKPOINT}test_failed_runs.py::test_saves_that_fall_due_before_the_vote_tells_of_a_nan_are_withheld"],
    "A2": [
        f"{CHECKPOINT}test_selection.py::test_what_cannot_be_read_for_a_while_costs_no_checkpoint",
        f"{CHECKPOINT}test_selection_ranks.py::test_a_file_that_one_rank_cannot_read_is_an_error_on_all",
    ],
    "A3": [f"{CHECKPOINT}test_second_job.py::test_resume_none_keeps_the_old_run"],
    "A4": [
        f"{CHECKPOINT}test_second_job.py::test_a_second_job_is_refused_with_the_name_of_the_first_and_harms_nothing",
        f"{CHECKPOINT}test_owner.py::test_a_job_that_lost_the_folder_saves_no_more_and_removes_nothing",
    ],
    "A5": [f"{CHECKPOINT}test_ends.py::test_a_script_that_ends_waits_for_its_save_and_says_so"],
    "A6": [f"{CHECKPOINT}test_ends.py::test_an_unsaved_preemption_does_not_end_with_85"],
    "A7": ["tests/launch/test_worker_files.py::test_an_exception_leaves_all_files_written"],
    "A8": [
        f"{CHECKPOINT}test_ends.py::test_ranks_that_leave_the_world_right_behind_a_save_have_saved",
        f"{CHECKPOINT}test_ends.py::test_what_goes_wrong_behind_the_rename_is_no_failed_save",
    ],
    "A9": [f"{CHECKPOINT}test_layouts.py::test_a_resumed_optimizer_steps_as_the_unbroken_one"],
    "A10": [
        f"{CHECKPOINT}test_saves_that_fail.py::test_a_run_of_which_nothing_was_saved_raises_at_its_end",
        f"{CHECKPOINT}test_saves_that_fail.py::test_a_run_that_may_write_no_more_says_what_to_do",
    ],
    "C": [
        f"{CHECKPOINT}test_hostile_files.py::test_numbers_and_dimensions_of_a_header_are_bounded",
        "tests/security/test_hostile_files.py::test_a_configuration_that_multiplies_is_refused_at_once",
    ],
}
"""By row, tests beside those of this folder that have the row in their name; by the beginning of their names."""


def names_in(path: Path) -> dict[str, bool]:
    """The tests of a file, and whether each runs by day."""
    found = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    marks = {node.name: [ast.unparse(each) for each in node.decorator_list] for node in found}
    return {name: "pytest.mark.nightly" not in marks[name] for name in marks if name.startswith("test_")}


NAMED = {
    name: by_day
    for folder in (Path(__file__).parent, ROOT / "tests" / "security")
    for path in sorted(folder.glob("test_*.py"))
    for name, by_day in names_in(path).items()
}


LOST_DATA = [f"A{number}" for number in range(1, 11)]  # of data that would be lost
INTRUDERS = [f"B{number}" for number in range(1, 8)]  # of who would get in


@pytest.mark.parametrize("row", [*range(1, 47), *LOST_DATA, *INTRUDERS, "C"])
def test_every_row_of_the_matrix_has_a_test_by_day(row: int | str) -> None:
    found = [by_day for name, by_day in NAMED.items() if name.startswith(f"test_row_{row}_".lower())]
    for place in ELSEWHERE.get(row, []):
        path, _, beginning = place.partition("::")
        matching = [by_day for name, by_day in names_in(ROOT / path).items() if name.startswith(beginning)]
        assert matching, f"there is no {place}"
        found += matching
    assert any(found), f"no test by day is for row {row}"
