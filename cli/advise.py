"""``osp-diag advise``: where few bits hurt a checkpoint, and what to leave in 16."""

from __future__ import annotations

import json as json_format
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from osp_diag.cli.checkpoint_options import DEFAULT_OPENING, DEFAULT_TOKENS, Opening, Tokens
from osp_diag.cli.quantize_inputs import (
    as_convention,
    calibration_tokens_of,
    check_same_model,
    check_sequences,
    evaluated_batches,
    held_out_tokens_of,
    memory_advice,
)
from osp_diag.errors import OspDiagError, UsageError

if TYPE_CHECKING:
    import xarray as xr

    from osp_diag.runs.run import Run

VERB = "advise"
HELP = "find where few bits hurt a checkpoint, and what to leave in 16"
_STAGES = ("one part at a time", "trying", "errors by layer", "hottest channels")

Subject = Annotated[str, tyro.conf.arg(metavar="CHECKPOINT|RUN")]


def run(
    subject: Subject,
    /,
    *,
    run: Path | None = None,
    bits: str = "4-4-16",
    budget: float = 0.05,
    methods: tuple[str, ...] = ("ffn-hadamard",),
    convention: Literal["plain", "osp"] = "plain",
    calibration: str | None = None,
    calibration_tokens: int = 1024,
    token_settings: Tokens = DEFAULT_TOKENS,
    opening: Opening = DEFAULT_OPENING,
    held_out: bool = False,
    blocks: str | None = None,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Find where few bits hurt, and what to leave in 16 bits; each advice is measured before it is given.

    On a calibration text every part of the model is rounded alone (weights by what they are, inputs by where
    they are, keys, values), in all layers and in each; the error of every block's output is split into what
    rounding adds there and what came from before. What costs most is then left in 16 bits within a budget:
    whole Linears, or the hottest channels of every Linear's input; other methods are tried for everything. On
    the evaluated text each change is measured, and one that does not save 5% of the divergence KL(full ‖
    rounded), or may do so by chance, is not advised: "nothing helps" is an answer.

    Args:
        subject: a checkpoint, as `osp-diag probe` takes it; or a run ending in .zarr: of a training, whose
            newest checkpoint is taken, or of a probe, whose checkpoint is opened where the run says it was.
        run: the run to keep the measurements in, for the figures bit_sensitivity and quantization_error; by
            default the one that is given in place of a checkpoint.
        bits: of weights, activations, and keys and values, such as 4-4-16.
        budget: share of the blocks' weights that may stay in 16 bits.
        methods: what to try in place of rounding to nearest: ffn-hadamard, gptq, quarot, spinquant and so on,
            as `osp-diag quantize` has them.
        convention: which grids there are, plain or as the scripts of the OSP release.
        calibration: text on which parts are ranked: a UTF-8 file, or the text itself; by default what follows
            the evaluated tokens in their source.
        calibration_tokens: how many tokens of it; time grows with them times parts times layers.
        token_settings: which tokens changes are measured on.
        opening: how to open the checkpoint.
        held_out: the tokens that the training which wrote the run held out, in its sequences.
        blocks: path of the list of blocks, where it is not found.
        out: a folder to write recipe.yaml (llm-compressor) and tensor-types.txt (llama.cpp) into.
        json: print all as JSON.

    Examples:
        osp-diag advise path/to/model
        osp-diag advise path/to/model --run run.zarr --bits 4-4-4 --budget 0.02 --out advice
        osp-diag advise osp.zarr --held-out --methods ffn-hadamard quarot-rtn
    """
    from osp_diag.cli.advise_text import as_dictionary, as_text
    from osp_diag.cli.quantize_progress import sweep_progress
    from osp_diag.quantizing.advice import advise, check_request
    from osp_diag.quantizing.advice_files import write_advice
    from osp_diag.quantizing.cases import Progress
    from osp_diag.quantizing.layer_errors import layer_errors
    from osp_diag.quantizing.measurements import store_measurements
    from osp_diag.quantizing.setting import Setting
    from osp_diag.quantizing.spared_channels import spared_channels
    from osp_diag.schema import LAYER_ERRORS, SENSITIVITY, SPARED_CHANNELS

    setting = Setting.read(bits)
    check_request(setting, budget, methods)
    check_sequences(token_settings, calibration_tokens)
    with _checkpoint(subject, run) as (source, holder):
        tokens_of_training = held_out_tokens_of(holder, token_settings) if held_out else None
        opened = _opened(source, subject, opening.open)
        if holder is not None:
            check_same_model(holder, opened)
        token_settings = as_convention(token_settings, convention, opened)
        batches = evaluated_batches(opened, token_settings, tokens_of_training)
        training = holder if held_out else None
        look = calibration_tokens_of(
            opened, token_settings, batches, calibration, calibration_tokens, training
        )
        batch_size = token_settings.batch_size or 1
        common: dict[str, Any] = {"convention": convention, "batch_size": batch_size, "blocks": blocks}
        path = None if holder is None else holder.path

        def keep(group: str, dataset: xr.Dataset, fingerprint: str, words: str) -> xr.Dataset:
            described = dataset.assign_attrs(
                token_source=words, token_fingerprint=fingerprint, model_fingerprint=opened.fingerprint
            )
            if path is not None:
                store_measurements(path, {group: described})
            return described

        with sweep_progress(opened.name, "stages") as bar, memory_advice(opened.name):

            def tell(what: str, done: int, total: int) -> None:
                if bar is not None:
                    bar(Progress(what, _STAGES.index(what), len(_STAGES), "steps", done, total))

            advice = advise(
                opened.model,
                batches.tokens,
                setting,
                calibration=look.tokens,
                budget=budget,
                methods=methods,
                progress=tell,
                **common,
            )
            keep(SENSITIVITY, advice.sensitivity, look.fingerprint, look.source)
            errors = layer_errors(
                opened.model, look.tokens, setting, progress=_stage(tell, "errors by layer"), **common
            )
            errors = keep(LAYER_ERRORS, errors, look.fingerprint, look.source)
            spared = spared_channels(
                opened.model,
                batches.tokens,
                setting,
                calibration=look.tokens,
                progress=_stage(tell, "hottest channels"),
                **common,
            )
            spared = keep(SPARED_CHANNELS, spared, batches.fingerprint, batches.source)
        notes = [*opened.notes, *batches.notes, *filter(None, [look.note(batches.tokens)])]
        notes += [f"parts are ranked on {look.description}", *spared.attrs.get("notes", ())]
        if json:
            print(json_format.dumps(as_dictionary(advice, errors, spared, notes), indent=2), flush=True)
        else:
            print(as_text(advice, errors, spared, opened.name, batches.source, notes), flush=True)
        if out is not None:
            files = write_advice(out, advice, opened.model, blocks=blocks)
            if not json:
                print(f"\nwritten: {', '.join(map(str, files))}")
    if path is not None and not json:
        print(f"\nstored in {path}   (osp-diag figure bit_sensitivity {path} --out sensitivity.png)")
    return 0


def _stage(tell: Callable[[str, int, int], None], name: str) -> Callable[[int, int], None]:
    return lambda done, total: tell(name, done, total)


@contextmanager
def _checkpoint(subject: str, run: Path | None) -> Iterator[tuple[str, Run | None]]:
    """Where the checkpoint is, for as long as this lasts, and the run that keeps what is measured."""
    from osp_diag.runs.folder import check_destination
    from osp_diag.runs.run import open_run

    of_run = subject.endswith(".zarr")
    if of_run and run is not None and run != Path(subject):
        raise UsageError(f"{subject} is a run itself: leave --run out, or give a checkpoint")
    where = Path(subject) if of_run else run
    holder = None if where is None else open_run(where)
    if where is not None:
        check_destination(where, resume=True)
    if not of_run or holder is None:
        yield subject, holder
        return
    if not holder.attrs.get("config"):
        yield _probed_checkpoint(holder), holder
        return
    from osp_diag.trainer.exporting import export_run

    with TemporaryDirectory(prefix="osp-diag-advise-") as folder:
        directory = Path(folder) / Path(subject).stem
        export_run(subject, directory)
        yield str(directory), holder


def _probed_checkpoint(run: Run) -> str:
    source = run.attrs.get("model_source")
    if not source:
        raise UsageError(
            f"{run.path} does not say which checkpoint it was probed from; give that: osp-diag advise "
            f"CHECKPOINT --run {run.path}"
        )
    return str(source)


def _opened(source: str, subject: str, opening: Callable[[str], Any]) -> Any:
    try:
        return opening(source)
    except OspDiagError as error:
        if subject.endswith(".zarr"):
            error.add_note(
                f"{subject} was probed from {source}; if that lies elsewhere now, give it: osp-diag advise "
                f"CHECKPOINT --run {subject}"
            )
        raise
