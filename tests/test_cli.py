"""The entry point: finding verbs, reading options, and what becomes of errors."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from importlib import import_module

import pytest

import osp_diag
from osp_diag.cli import main as entry
from osp_diag.cli.discovery import find_verbs
from osp_diag.cli.main import main
from osp_diag.cli.options import description

REAL_VERBS = find_verbs()

MEASURE = '''
"""A verb for tests."""
from __future__ import annotations
from pathlib import Path
from typing import Literal

VERB = "measure"
HELP = "Measure something."

def run(
    checkpoint: str,
    /,
    *,
    seq_len: int = 512,
    out: Path | None = None,
    protocol: Literal["sequence", "osp-published"] = "sequence",
    sites: tuple[str, ...] = ("*",),
    json: bool = False,
    bar: bool = True,
) -> int | None:
    """Measure a checkpoint.

    Every statistic of every layer.

    Args:
        checkpoint: a directory or a hub id.
        seq_len: tokens in a sequence.
        out: where the run goes.

    Returns:
        The exit code.

    Examples:
        osp-diag measure model --seq-len 128
        osp-diag measure model --json
    """
    print(checkpoint, seq_len, repr(out), protocol, sites, json, bar)
    return 1 if checkpoint == "sick" else None
'''

FAIL = '''
"""A verb that fails as it is told."""
VERB: str = "fail"
HELP: str = "Fail."

def run(how: str) -> int | None:
    """Fail.

    Examples:
        osp-diag fail usage
    """
    from osp_diag.errors import CheckpointError
    if how == "usage":
        raise CheckpointError("no file model.gguf in /data; give the path of a checkpoint")
    if how == "bug":
        raise ValueError("cannot reshape")
    if how == "extra":
        raise ModuleNotFoundError("No module named 'jax.numpy'", name="jax.numpy")
    if how == "exit":
        raise SystemExit(5)
    error = KeyboardInterrupt()
    if how == "interrupted-late":
        error.add_note("run.zarr holds the steps up to 300.")
    raise error
'''


@pytest.fixture
def verbs(tmp_path, monkeypatch):
    """A package of two verbs, and a third that cannot be imported, in place of the real ones."""
    package = tmp_path / "verbs_for_tests"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "measure.py").write_text(MEASURE)
    (package / "fail.py").write_text(FAIL)
    (package / "broken.py").write_text('import no_such_module\nVERB = "broken"\nHELP = "Never imported."\n')
    (package / "helper.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(entry, "find_verbs", lambda: find_verbs("verbs_for_tests"))
    monkeypatch.delenv("OSP_DIAG_TRACEBACK", raising=False)
    yield
    for name in [name for name in sys.modules if name.startswith("verbs_for_tests")]:
        del sys.modules[name]


def test_help_lists_the_verbs_without_importing_them(verbs, capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "  broken   Never imported.\n  fail     Fail.\n  measure  Measure something.\n" in shown
    assert "helper" not in shown
    assert "exit codes: 0 fine, 1 found something bad, 2 could not do what was asked" in shown
    assert "example:\n  osp-diag probe " in shown


def test_help_and_version_load_no_numerical_library():
    code = "import sys\nfrom osp_diag.cli.main import main\nmain(['--help']), main(['--version'])\n"
    code += "print({'numpy', 'torch', 'tyro', 'xarray', 'rich'} & set(sys.modules) or 'light')"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "light"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"osp-diag {osp_diag.__version__}\n"


def test_nothing_asked_is_misuse_and_shows_the_verbs_on_stderr(verbs, capsys):
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "measure" in shown.err


@pytest.mark.parametrize(
    ("typed", "advice"),
    [("mesure", "did you mean measure?"), ("xyz", "there are broken, fail, measure")],
)
def test_an_unknown_verb_names_the_nearest(verbs, capsys, typed, advice):
    assert main([typed]) == 2
    expected = f"osp-diag: there is no verb {typed!r}; {advice} (`osp-diag --help` lists them)\n"
    assert capsys.readouterr().err == expected


def test_the_help_of_a_verb_is_its_docstring(verbs, capsys):
    assert main(["measure", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: osp-diag measure" in shown
    assert "Every statistic of every layer." in shown
    assert "Examples:\n    osp-diag measure model --seq-len 128\n    osp-diag measure model --json\n" in shown
    assert "--out PATH" in shown
    assert "tokens in a sequence. (default: 512)" in shown
    assert "{sequence,osp-published}" in shown
    assert "--no-bar" in shown
    assert "The exit code" not in shown


def test_long_paragraphs_are_wrapped_and_laid_out_ones_kept(monkeypatch):
    def run() -> None:
        pass

    run.__doc__ = "Short.\n\n" + "word " * 20 + "\n\n- one\n  more\n\nArgs:\n    none: nothing.\n"
    monkeypatch.setenv("COLUMNS", "40")
    shown = description(run)
    assert shown.startswith("Short.\n\nword word")
    assert max(map(len, shown.splitlines())) <= 40
    assert shown.endswith("\n\n- one\n  more")


def test_parameters_become_options(verbs, capsys):
    assert main(["measure", "model"]) == 0
    assert capsys.readouterr().out == "model 512 None sequence ('*',) False True\n"
    options = "--seq-len 8 --out r.zarr --protocol osp-published --sites a b --json --no-bar"
    assert main(["measure", "m", *options.split()]) == 0
    assert capsys.readouterr().out == "m 8 PosixPath('r.zarr') osp-published ('a', 'b') True False\n"


def test_found_something_bad_is_exit_code_1(verbs):
    assert main(["measure", "sick"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["measure"], "Missing from osp-diag measure"),
        (["measure", "m", "--seq-len", "many"], "Error parsing --seq-len: invalid literal for int()"),
        (["measure", "m", "--protocol", "none"], "--protocol"),
        (["measure", "m", "--sequence-length", "4"], "Unrecognized options: --sequence-length"),
    ],
)
def test_usage_errors_exit_with_2(verbs, capsys, words, message):
    assert main(words) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_our_errors_are_a_message_without_a_traceback(verbs, capsys):
    assert main(["fail", "usage"]) == 2
    expected = "osp-diag: no file model.gguf in /data; give the path of a checkpoint\n"
    assert capsys.readouterr().err == expected


def test_other_errors_say_that_they_are_unexpected(verbs, capsys):
    assert main(["fail", "bug"]) == 2
    assert capsys.readouterr().err == (
        "osp-diag: unexpected ValueError: cannot reshape\n"
        "This is a defect of osp-diag; --traceback shows where it lies.\n"
    )


def test_a_traceback_is_shown_to_who_asks(verbs, capsys, monkeypatch):
    assert main(["fail", "usage", "--traceback"]) == 2
    first = capsys.readouterr().err
    monkeypatch.setenv("OSP_DIAG_TRACEBACK", "1")
    assert main(["fail", "bug"]) == 2
    for shown in (first, capsys.readouterr().err):
        assert shown.startswith("Traceback (most recent call last):")
        assert "fail.py" in shown
        assert "--traceback" not in shown.splitlines()[-1]


def test_a_missing_extra_is_named(verbs, capsys):
    assert main(["fail", "extra"]) == 2
    expected = "osp-diag: this needs the package 'jax': pip install \"osp-diag[jax]\"\n"
    assert capsys.readouterr().err == expected


def test_a_verb_that_cannot_be_imported_breaks_only_itself(verbs, capsys):
    assert main(["broken"]) == 2
    assert "unexpected ModuleNotFoundError: No module named 'no_such_module'" in capsys.readouterr().err
    assert main(["measure", "m"]) == 0


def test_a_verb_may_exit_by_itself(verbs):
    with pytest.raises(SystemExit, match="5"):
        main(["fail", "exit"])


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("interrupted", "what had already been written to disk is kept."),
        ("interrupted-late", "run.zarr holds the steps up to 300."),
    ],
)
def test_an_interrupted_verb_says_what_is_kept(verbs, capsys, how, kept):
    assert main(["fail", how]) == 130
    assert capsys.readouterr().err == f"osp-diag: interrupted; {kept}\n"


def test_a_reader_that_has_gone_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "osp_diag", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 141


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "osp_diag", "prob"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("osp-diag: there is no verb 'prob'; did you mean probe?")


@pytest.mark.parametrize("name", REAL_VERBS)
def test_every_real_verb_keeps_the_contract(name, capsys):
    verb = REAL_VERBS[name]
    assert verb.help, f"{verb.module} has no HELP"
    assert "\n" not in verb.help
    run = import_module(verb.module).run
    for parameter in inspect.signature(run).parameters:
        assert f"    {parameter}: " in (inspect.getdoc(run) or ""), (
            f"{parameter} is not described under Args:"
        )
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: osp-diag {name}" in shown
    assert f"Examples:\n    osp-diag {name}" in shown
