"""The command line: ``main`` is the entry point, and every other file here with a ``VERB`` is a verb.

A file becomes a verb by defining, at its top level::

    VERB = "probe"                       # what the user types
    HELP = "Measure a checkpoint."       # one line for `osp-diag --help`

    def run(checkpoint: str, /, *, tokens: int = 65_536, out: Path | None = None) -> int | None: ...

``osp_diag.cli.main`` says how parameters become options.
"""

if __name__ != "osp_diag.cli":
    raise ImportError(
        f"{__file__} is osp_diag's own folder, seen because Python was started beside it; write "
        "osp_diag.cli for ours, or start Python elsewhere for the package that is called cli"
    )
