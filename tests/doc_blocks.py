"""The fenced code of a Markdown page, and the commands that its shell lines would run."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Block", "blocks_of", "commands_in", "inline_commands", "osp_diag_words"]

ROOT = Path(__file__).parents[1]
PROGRAMS = ("osp-diag", "python", "pip", "make", "torchrun", "git", "cd")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SHELL = re.compile(r"^(?:\w+=\S+ )*(?:for|" + "|".join(PROGRAMS) + r")\b")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    """as the fence says; ``sh`` where it says nothing and the first line is a command"""
    text: str
    line: int
    """of the first line of its text, in the page"""
    saved_as: str = ""
    """the path that the paragraph before it tells the reader to save it as"""


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    blocks, end = [], 0
    for fence in _FENCE.finditer(text):
        paragraph = text[end : fence.start()].rstrip().rpartition("\n\n")[2]
        saved = re.search(r"Save it as\s+`([^`]+)`", paragraph)
        language = fence[1] or ("sh" if _SHELL.match(fence[2]) else "")
        line = text.count("\n", 0, fence.start(2)) + 1
        blocks.append(Block(language, fence[2], line, saved[1] if saved else ""))
        end = fence.end()
    return blocks


def commands_in(script: str) -> list[list[str]]:
    """The words of each command that a shell script would run, loops unrolled; none is run.

    A program that is not among ``PROGRAMS`` fails.
    """
    record = "record() { printf '%s\\037' \"$@\"; printf '\\036'; }\nset -eu\nPATH=/nowhere\n"
    record += "".join(f'{name}() {{ record {name} "$@"; }}\n' for name in PROGRAMS)
    done = subprocess.run(
        [shutil.which("bash") or "bash", "-c", record + script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [entry.split("\037")[:-1] for entry in done.stdout.split("\036")[:-1]]


def inline_commands(page: Path) -> list[str]:
    """Commands in the text of a page, between backticks: all but those with a word in capitals to fill in."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    spans = re.findall(r"`((?:osp-diag|python -m osp_diag) [^`]+)`", text)
    spans = [" ".join(span.split()) for span in spans]
    return [span for span in spans if not re.search(r"(?<![\w-])[A-Z]+\b", span)]


def osp_diag_words(command: Sequence[str]) -> list[str] | None:
    """What follows ``osp-diag`` in a command, however it is started; None if it is another command."""
    for start in (["osp-diag"], ["python", "-m", "osp_diag"]):
        if list(command[: len(start)]) == start:
            return list(command[len(start) :])
    if command[0] == "torchrun" and "--module" in command:
        place = list(command).index("--module")
        assert command[place + 1] == "osp_diag", command
        return list(command[place + 2 :])
    return None
