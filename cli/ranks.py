"""Several processes under ``torchrun``, of which one speaks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from hashlib import sha256
from pathlib import Path

__all__ = ["one_result", "say_once"]


def _rank() -> int:
    """This process's number, as ``torchrun`` gives it; also before and after the process group exists."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return int(os.environ.get("RANK", "0")) if several else 0


@contextmanager
def one_result() -> Iterator[None]:
    """Keep standard output to the first rank."""
    if _rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def say_once(message: str) -> None:
    """Say on standard error what went wrong, unless another rank of this machine has said just that.

    What only some ranks meet (a full device, a file that one host lacks) is said by the first of them.
    """
    if _is_new(message):
        prefix = "" if _rank() == 0 else f"rank {_rank()}: "
        print(f"{prefix}{message}", file=sys.stderr)


def _is_new(message: str) -> bool:
    # torchrun gives every process a folder for its errors, in one that those of a start share.
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return True
    said = Path(error_file).parent.parent / f"said-{sha256(message.encode()).hexdigest()[:16]}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # twice is better than never
    return True
