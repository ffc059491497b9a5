"""One job in five frameworks: lines of user code, and what each makes of a kill. python benchmarks/desk/compare.py

Each script trains the language model of `task.py` over 2 ranks on the CPU: AdamW with parameter groups, a cosine with a
warm-up, accumulation of 4, clipping, bf16, an evaluation every so often, TensorBoard, checkpoints, resume and early
stopping. Every script is run three times: unbroken, until SIGKILL to all of its processes between two checkpoints, and
again to the end. Printed for each are:
- lines: of code, without blanks, comments and docstrings.
- resumed: whether the parameters at the end equal the unbroken run's, to the last bit.
- series: whether each series in TensorBoard has every step once, with the unbroken run's value.
- seconds: of the unbroken run, start-up included.

`--features` runs nothing and prints how many lines of each script have to do with each feature, by the words in them; a
line may have to do with several.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from machine import machine_line  # noqa: E402

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHED = {
    "allstep": [sys.executable, "-m", "allstep", "run", "--nproc", "2"],
    "ddp": TORCHRUN,
    "accelerate": TORCHRUN,
    "lightning": [sys.executable],
    "ignite": TORCHRUN,
}


FEATURES = {
    "accumulation": r"ACCUMULATE|accumulat|is_last|no_sync|sync_gradients|group_end|state\.weight",
    "precision": r"bf16|bfloat16|autocast",
    "clipping": r"CLIP|clip|norm",
    "schedule": r"[Ss]chedule|cosine|factor|get_last_lr|LearningRateMonitor|step\.step",
    "evaluation": r"evaluat|validation|perplexity|no_grad|val/|Evaluate|eval\(",
    "early stopping": r"PATIENCE|worse|best|better|EarlyStopping",
    "tracking": r"board|Track|add_scalar|self\.log\(|log_with|accelerator\.log|log_every|tell",
    "checkpoints": r"sav|[Cc]heckpoint|folder|found|place|generators|load_state|done|Project",
}
"""Words by which a line has to do with a feature."""


def lines_by_feature(path: Path) -> dict[str, int]:
    text = path.read_text().splitlines()
    lines = [text[number - 1] for number in code_lines(path)]
    lines = [line for line in lines if not line.startswith(("import ", "from "))]
    return {name: sum(bool(re.search(words, line)) for line in lines) for name, words in FEATURES.items()}


def lines_of_code(path: Path) -> int:
    """Lines that hold a token of code; a docstring is none."""
    return len(code_lines(path))


def code_lines(path: Path) -> list[int]:
    """Their numbers, from 1."""
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    begins = True  # a statement begins: a string here is a docstring
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            begins = True
        elif token.type not in nothing:
            if not (begins and token.type == tokenize.STRING):
                lines.update(range(token.start[0], token.end[0] + 1))
            begins = False
    return sorted(lines)


def command(framework: str, out: Path, scale: list[str]) -> list[str]:
    return [*LAUNCHED[framework], str(HERE / f"with_{framework}.py"), "--out", str(out), *scale]


def run(framework: str, out: Path, scale: list[str], kill_after: int | None = None) -> tuple[str, float]:
    """Run a script to its end, or until it has logged an iteration and is killed; what it printed, and how long."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    began, printed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command(framework, out, scale),
            cwd=folder,
            env={**environ, "DESK_MARK": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            found = re.search(r"iteration (\d+)", line)
            if kill_after is not None and found and int(found[1]) >= kill_after:
                kill_all(folder)
                break
        process.stdout.close()
        process.wait()
    return "".join(printed), time.monotonic() - began


def kill_all(mark: str) -> None:
    """SIGKILL to every process of a run, which has the mark in its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"DESK_MARK={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue


def series(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Every series that TensorBoard's own reader finds, in the order in which it was written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for folder in sorted({file.parent for file in out.rglob("events.out.tfevents.*")}):
        reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in reader.Scalars(tag))
    return found


def digest(printed: str) -> str:
    found = re.findall(r"digest (\w+)", printed)
    if not found:
        raise SystemExit(f"a script did not come to its end:\n{printed}")
    return str(found[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(LAUNCHED), choices=LAUNCHED)
    parser.add_argument("--iterations", type=int, default=240)
    parser.add_argument("--features", action="store_true")
    arguments = parser.parse_args()
    if arguments.features:
        found = {each: lines_by_feature(HERE / f"with_{each}.py") for each in arguments.only}
        print(f"{'lines for':<16}" + "".join(f"{each:>12}" for each in found))
        for feature in FEATURES:
            print(f"{feature:<16}" + "".join(f"{lines[feature]:>12}" for lines in found.values()))
        print(f"{'in all':<16}" + "".join(f"{lines_of_code(HERE / f'with_{each}.py'):>12}" for each in found))
        return
    total = arguments.iterations
    scale = ["--iterations", str(total), "--evaluate", str(total // 6), "--save", str(total // 12), "--tell", "4"]
    print(machine_line())
    print(f"{total} iterations over 2 ranks, killed behind {total // 2 + 6}")
    print(f"{'framework':<12}{'lines':>7}{'resumed':>10}{'series':>10}{'seconds':>10}")
    for framework in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            unbroken, broken = Path(folder) / "unbroken", Path(folder) / "broken"
            printed, seconds = run(framework, unbroken, scale)
            run(framework, broken, scale, kill_after=total // 2 + 6)
            again, _ = run(framework, broken, scale)
            is_same = digest(again) == digest(printed)
            whole = series(unbroken)
            is_whole = bool(whole) and series(broken) == whole
        lines = lines_of_code(HERE / f"with_{framework}.py")
        marks = ["equal" if is_same else "differs", "equal" if is_whole else "differs"]
        print(f"{framework:<12}{lines:>7}{marks[0]:>10}{marks[1]:>10}{seconds:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
