"""The pages of the documentation, and the blocks of code in them.

A python block is one of three things. A *script* has a line `if __name__ == "__main__":`, or opens a World itself, and
stands alone. A block whose first line is `# not run: needs ...` cannot run here, says why, and is only compiled. Every
other block is a *fragment*: it runs on a rank with the names that the page takes for granted (see `around.py`) and
those that earlier fragments of the page made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

_FENCE = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block: where it begins, its language and its text without indentation."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_script(self) -> bool:
        return ("__main__" in self.text or "allstep.init(" in self.text) and not self.reason

    @property
    def reason(self) -> str:
        """Why the block is not run; empty where it is."""
        found = re.match(r"# not run: (.+)", self.text)
        return found[1] if found else ""


def blocks(page: Path, language: str = "python") -> list[Block]:
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        indent, its_language, body = match.groups()
        lines = [line.removeprefix(indent) for line in body.splitlines()]
        at = text.count("\n", 0, match.start()) + 2  # the line after the fence
        found.append(Block(page, at, its_language, "\n".join(lines) + "\n"))
    return [block for block in found if block.language == language]


def output_after(script: Block) -> str | None:
    """The ```text block that follows a script before its page's next block: what the script prints."""
    following = [
        block
        for language in ("python", "text", "bash")
        for block in blocks(script.page, language)
        if block.line > script.line
    ]
    nearest = min(following, key=lambda block: block.line, default=None)
    return nearest.text if nearest is not None and nearest.language == "text" else None
