"""Finding the verbs without importing them, so that ``osp-diag --help`` never waits for torch."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from osp_diag.errors import UsageError
from osp_diag.wording import did_you_mean

__all__ = ["Verb", "find_verbs", "verb_by_name"]

PACKAGE = "osp_diag.cli"


@dataclass(frozen=True)
class Verb:
    """One verb: what the user types, its line in the help, and the module that runs it."""

    name: str
    help: str
    module: str


def find_verbs(package: str = PACKAGE) -> dict[str, Verb]:
    """The verbs by name, in alphabetical order: every module of ``package`` that defines ``VERB``.

    The files are parsed, not imported: a verb may import torch at its top and still cost the others
    nothing.
    """
    verbs = (_verb_in(entry, package) for entry in files(package).iterdir() if entry.name.endswith(".py"))
    return {verb.name: verb for verb in sorted(filter(None, verbs), key=lambda verb: verb.name)}


def verb_by_name(name: str, verbs: Mapping[str, Verb]) -> Verb:
    """The verb called ``name``.

    Raises
    ------
    UsageError
        There is none; the message names the nearest one.
    """
    if name in verbs:
        return verbs[name]
    raise UsageError(
        f"there is no verb {name!r}; {did_you_mean(name, verbs, '`osp-diag --help` lists them')}"
    )


def _verb_in(source: Traversable, package: str) -> Verb | None:
    """The verb that a source file defines by top-level string constants ``VERB`` and ``HELP``."""
    constants: dict[str, str] = {}
    for statement in ast.parse(source.read_text(encoding="utf-8")).body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text)))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=str(text)))
            ):
                constants[name] = text
    if "VERB" not in constants:
        return None
    module = f"{package}.{source.name.removesuffix('.py')}"
    return Verb(constants["VERB"], constants.get("HELP", ""), module)
