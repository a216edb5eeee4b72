"""The entry point ``osp-diag``: finds the verb, reads its options, runs it, and turns errors into messages.

The contract of a verb (a module in this package, see :mod:`osp_diag.cli`):

* ``VERB`` and ``HELP`` are top-level string constants. They are read without importing the module, and
  only the module of the verb that was asked for is imported; it may import whatever it likes.
* ``run(...)`` is a plain typed function. Parameters without a default are positional on the command
  line; the others are options: ``seq_len: int = 512`` is ``--seq-len``, ``out: Path | None = None`` is
  ``--out PATH``, ``json: bool = False`` is ``--json`` (a flag; one that is True by default becomes
  ``--no-…``), ``runs: tuple[Path, ...]`` takes any number, ``Literal["a", "b"]`` only these.
  ``Annotated[..., tyro.conf.arg(metavar="CHECKPOINT")]`` names a value in the help.
* Its docstring is the help: the description, ``Args:`` for each parameter, and ``Examples:`` last, whose
  lines are shown as they stand. Every verb has an example.
* It returns the exit code: ``None`` or 0 for fine, 1 for "found something bad". Misuse raises an
  :class:`osp_diag.errors.OspDiagError`, whose message is shown without a traceback, with exit code 2.
* Interrupted, it says what remains by ``error.add_note(...)`` on the ``KeyboardInterrupt`` it lets
  through; the exit code is then 130.
* Results go to stdout, everything else to stderr. Progress is shown only where stderr is a terminal.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence

import osp_diag
from osp_diag.cli.discovery import Verb, find_verbs, verb_by_name
from osp_diag.cli.ranks import one_result, say_once
from osp_diag.errors import OspDiagError
from osp_diag.foreign_errors import foreign_origin
from osp_diag.terminal import filtered_streams
from osp_diag.text.panics import is_panic

__all__ = ["main"]

FINE, MISUSE, INTERRUPTED, BROKEN_PIPE = 0, 2, 130, 141
"""Exit codes beside 1, which only verbs return. The last two are what a shell reports for these signals."""

EXTRA_OF = {
    "dash": "live",
    "datasets": "datasets",
    "jax": "jax",
    "jaxlib": "jax",
    "lm_eval": "tasks",
    "nnsight": "nnsight",
}
"""Which extra brings a package that the core does without."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Parameters
    ----------
    arguments
        What follows ``osp-diag``; the process's own command line if None.
    """
    if arguments is None:
        arguments = sys.argv[1:]
        _silence_libraries()
    # Wherever it stands: people add it at the end of the line that failed.
    show_traceback = "--traceback" in arguments or os.environ.get("OSP_DIAG_TRACEBACK", "") not in ("", "0")
    words = [word for word in arguments if word != "--traceback"]
    try:
        with one_result():
            code = _dispatch(words)
        sys.stdout.flush()  # so that a reader that has gone is noticed here, not by the interpreter at exit
        return code
    except BaseException as error:
        if not isinstance(error, (Exception, KeyboardInterrupt)) and not is_panic(error):
            raise
        with filtered_streams():
            if show_traceback:
                traceback.print_exc()
            return _report(error, show_traceback)


def _dispatch(words: Sequence[str]) -> int:
    if words and words[0] in ("--version", "-V"):
        print(f"osp-diag {osp_diag.__version__}")
        return FINE
    verbs = find_verbs()
    if not words or words[0] in ("--help", "-h"):
        print(_overview(verbs), file=sys.stdout if words else sys.stderr)
        return FINE if words else MISUSE
    return _run(verb_by_name(words[0], verbs), words[1:])


def _overview(verbs: Mapping[str, Verb]) -> str:
    """What ``osp-diag --help`` prints."""
    width = max((len(name) for name in verbs), default=0)
    lines = "\n".join(f"  {verb.name:<{width}}  {verb.help}" for verb in verbs.values())
    return f"""usage: osp-diag VERB [OPTIONS]

Where the outliers and attention sinks of a language model are, under their published definitions.

verbs:
{lines}

options:
  -h, --help     this text; after a verb, its options and an example
  -V, --version  the version
  --traceback    show where an error comes from (or set OSP_DIAG_TRACEBACK=1)

exit codes: 0 fine, 1 found something bad, 2 could not do what was asked

example:
  osp-diag probe path/to/model --out run.zarr"""


def _run(verb: Verb, words: Sequence[str]) -> int:
    """Import the verb's module, read ``words`` by the signature of its ``run``, and call it."""
    # Only here, since neither --version nor the overview needs the option parser.
    from osp_diag.cli.options import call_described_by

    run = importlib.import_module(verb.module).run
    try:
        call = call_described_by(words, run, f"osp-diag {verb.name}")
    except SystemExit as stop:  # after --help, or a usage error that has been shown
        return stop.code if isinstance(stop.code, int) else MISUSE
    with filtered_streams():
        return run(*call.positional, **call.keywords) or FINE


def _report(error: BaseException, has_traceback: bool) -> int:
    """Say what went wrong, on stderr, and return the exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader has gone (`| head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    message, code = _message_of(error, has_traceback)
    say_once(f"osp-diag: {message}")
    return code


def _message_of(error: BaseException, has_traceback: bool) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        notes = " ".join(getattr(error, "__notes__", ())) or "what had already been written to disk is kept."
        return f"interrupted; {notes}", INTERRUPTED
    if isinstance(error, OspDiagError):
        return "\n".join((str(error), *getattr(error, "__notes__", ()))), error.exit_code
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in EXTRA_OF:
        advice = f'this needs the package {package!r}: pip install "osp-diag[{EXTRA_OF[package]}]"'
        return advice, MISUSE
    message = f"unexpected {type(error).__name__}: {error}"
    origin = foreign_origin(error)
    if origin:
        message += f"\nIt was raised outside of osp-diag, by the model or function given: {origin}"
    elif not has_traceback:
        message += "\nThis is a defect of osp-diag; --traceback shows where it lies."
    return message, MISUSE


def _silence_libraries() -> None:
    """Turn the progress bars of other libraries off where nobody watches; read when they are imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
