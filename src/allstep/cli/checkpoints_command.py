"""`allstep checkpoints`: what lies in a folder of checkpoints, and what to do with it.

Contract: one process, beside a run or without one. `ls` changes nothing. `verify` marks a checkpoint in which it read
something wrong, so that listings say so and runs pass it over. Exit codes: 0 all well; 1 a checkpoint is damaged; 2 a
wrong command line, or nothing of that name.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from allstep.cli.parser import Parser
from allstep.cli.tables import print_table
from allstep.errors import CheckpointError, printable

if TYPE_CHECKING:
    from allstep.checkpoint.catalog import Entry

DESCRIPTION = """\
List, verify, export and remove checkpoints. FOLDER is what a run saved to: a path, or an address such as
s3://bucket/run.
"""

EPILOG = """\
exit code:
  0  all well
  1  a checkpoint is damaged
  2  wrong command line, or no such checkpoint

examples:
  allstep checkpoints ls runs/digits/checkpoints
  allstep checkpoints verify runs/digits/checkpoints
  allstep checkpoints export runs/digits/checkpoints model.safetensors --only model
  allstep checkpoints export runs/digits/checkpoints digits-model --max-shard-size 2GB
  allstep checkpoints rm runs/digits/checkpoints save-000001-step-100
"""

_HEADINGS = ("NAME", "STEP", "SIZE", "WORLD", "SAVED (UTC)", "STATE", "METRICS")


def main(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return the exit code."""
    arguments = _parser().parse_args(argv)
    commands = {"ls": _list, "verify": _verify, "export": _export, "rm": _remove}
    return commands[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> int:
    from allstep.checkpoint.catalog import check_folder, entries

    check_folder(arguments.folder)
    found = entries(arguments.folder)
    if arguments.json:
        print(json.dumps([_as_json(entry) for entry in found], indent=1))
    elif not found:
        print(f"no checkpoints in {arguments.folder}")
    else:
        print_table([_HEADINGS, *map(_row, found)])
    # An unfinished checkpoint is what a save in progress looks like, so it is no failure.
    return int(any(entry.state in ("damaged", "quarantined") for entry in found))


def _verify(arguments: argparse.Namespace) -> int:
    from allstep.checkpoint.catalog import check_folder, entries, find_damage, find_entry, mark_damaged
    from allstep.checkpoint.manifest import QUARANTINE

    check_folder(arguments.folder)
    named = [find_entry(arguments.folder, name) for name in arguments.names]
    chosen = named or [entry for entry in entries(arguments.folder) if entry.state != "unfinished"]
    damaged = False
    for entry in chosen:
        wrong, unread = find_damage(entry, "size" if arguments.size else "full")
        if arguments.size and entry.state == "quarantined":  # what was found before is not seen by sizes
            wrong = wrong or entry.problems
        damaged |= bool(wrong or unread)
        print(printable(f"{entry.name}: {'damaged' if wrong else 'unreadable' if unread else 'whole'}"))
        if wrong and entry.state == "whole":  # by its sizes, so that a listing would call it so
            try:
                mark_damaged(entry, wrong)
            except CheckpointError as error:
                unread.append(str(error))
        if entry.state == "quarantined" and not (wrong or unread):
            print(f"  it was marked as damaged before, and no run uses it before {QUARANTINE} is removed from it")
        for problem in (*wrong, *unread):  # what stands in a file, and names of files, are anybody's
            print(f"  {printable(problem)}")
    if not chosen:  # so that nothing verified does not pass for all verified
        print(f"no checkpoints in {arguments.folder}")
    return int(damaged)


def _export(arguments: argparse.Namespace) -> int:
    from allstep.checkpoint.catalog import find_entry

    entry = find_entry(arguments.folder, arguments.checkpoint)
    # By its name, for this one needs torch, which the launcher's process does without.
    importlib.import_module("allstep.checkpoint.exporting").export(
        entry, arguments.file, arguments.only, arguments.max_shard_size
    )
    print(printable(f"wrote {arguments.file} from {entry.name}"))
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    from allstep.checkpoint.catalog import find_entry, remove

    # All are looked up first: a wrong name removes nothing.
    chosen = [find_entry(arguments.folder, name) for name in arguments.names]
    for entry in chosen:
        remove(entry)
        print(printable(f"removed {entry.name}"))
    return 0


def _row(entry: Entry) -> tuple[str, ...]:
    manifest = entry.manifest
    if manifest is None:
        return (entry.name, "", "", "", "", entry.state, "")
    metrics = "  ".join(f"{name}={value:.6g}" for name, value in manifest.metrics.items())
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(manifest.created))
    # A quarantined one was found damaged by a run, or by `verify`.
    state = "damaged (quarantined)" if entry.state == "quarantined" else entry.state
    return (entry.name, str(manifest.step), _size(manifest.size), str(manifest.world_size), saved, state, metrics)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def _as_json(entry: Entry) -> dict[str, object]:
    manifest = entry.manifest.model_dump(mode="json") if entry.manifest is not None else None
    return {"name": entry.name, "state": entry.state, "problems": entry.problems, "manifest": manifest}


def _parser() -> Parser:
    parser = Parser(prog="allstep checkpoints", description=DESCRIPTION, epilog=EPILOG)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls|verify|export|rm")
    listing = _add(actions.add_parser, "ls", "a table of what is there, the newest last")
    listing.add_argument("--json", action="store_true", help="as JSON, with all that the manifests say")
    verifying = _add(actions.add_parser, "verify", "read every file and compare its hash")
    verifying.add_argument("names", nargs="*", metavar="NAME", help="checkpoints to verify (default: all)")
    verifying.add_argument("--size", action="store_true", help="compare sizes only")
    exporting = _add(actions.add_parser, "export", "write a checkpoint's state to a file or a folder of files")
    exporting.add_argument(
        "file",
        metavar="FILE",
        help="ends with .safetensors (tensors) or .pt (all state); or a new folder, for a model as the Hugging Face "
        "hub lays it out",
    )
    exporting.add_argument("--checkpoint", metavar="NAME", help="which one (default: the newest that is whole)")
    exporting.add_argument("--only", metavar="PART", help="one part of the state, such as model")
    exporting.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of each file in a folder, such as 500MB (default: 5GB)"
    )
    removing = _add(actions.add_parser, "rm", "remove checkpoints")
    removing.add_argument("names", nargs="+", metavar="NAME", help="checkpoints to remove")
    for action in (listing, verifying, exporting, removing):
        parser.options += action.options
    parser.words += actions.choices
    return parser


def _add(add_parser: Callable[..., Parser], name: str, summary: str) -> Parser:
    action = add_parser(name, help=summary, description=f"{summary.capitalize()}.")
    action.add_argument("folder", metavar="FOLDER", help="where a run saves its checkpoints")
    return action
