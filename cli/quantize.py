"""``osp-diag quantize``: what a checkpoint is worth at few bits."""

from __future__ import annotations

import json as json_format
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from osp_diag.cli.checkpoint_options import (
    DEFAULT_OPENING,
    DEFAULT_TOKENS,
    CheckpointName,
    Opening,
    Tokens,
    check_tokens,
)
from osp_diag.errors import UsageError
from osp_diag.probing.settings import TokenSettings
from osp_diag.quantizing.setting import CALIBRATION_TOKENS

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr

    from osp_diag.checkpoints import Checkpoint
    from osp_diag.quantizing.calibration import Calibration
    from osp_diag.quantizing.cases import Case
    from osp_diag.quantizing.results import QuantizedResult
    from osp_diag.quantizing.tables import PaperTable
    from osp_diag.runs.run import Run
    from osp_diag.tokens import TokenBatches

VERB = "quantize"
HELP = "measure a checkpoint's perplexity at few bits, and keep it in its run"
_MEMORY = re.compile(r"not enough memory|out of memory|allocate memory", re.IGNORECASE)


def run(
    checkpoint: CheckpointName,
    /,
    *,
    run: Path | None = None,
    bits: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--widths"])] = (),
    method: tuple[str, ...] = (),
    convention: Literal["plain", "osp"] | None = None,
    table: int | None = None,
    seeds: tuple[int, ...] = (0,),
    calibration: str | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    again: bool = False,
    token_settings: Tokens = DEFAULT_TOKENS,
    opening: Opening = DEFAULT_OPENING,
    held_out: bool = False,
    blocks: str | None = None,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Measure what a checkpoint is worth at few bits: the perplexity of a text under several bit widths.

    Simulated: the Linears inside the blocks multiply numbers that are rounded to few bits, and attention
    reads such keys and values. Each row has a 95% interval (bootstrap over sequences) and the divergence
    KL(full ‖ quantized) of the next-token distributions from those of the full-precision model. With --run
    the rows go into the run of that checkpoint (which `osp-diag probe` or a training wrote), each when it is
    measured; what is there is not measured again, so that an interrupted sweep goes on where it stopped. The
    figures bit_width_sweep, quantization_scatter and ablation_table find them there. Compare models on the
    same text and tokenizer only.

    Args:
        checkpoint: what to measure, as `osp-diag probe` takes it; for a training, what `osp-diag export`
            wrote.
        run: the run to add the results to.
        bits: of weights, activations, and keys and values, such as 4-4-4 (or W4A4KV4, W4A4), 16 for "as it
            is"; by default weights from 8 to 3 bits, activations from 8 to 4, and 8-8-16, 4-8-16, 4-4-16.
        method: rtn (round to nearest), ffn-hadamard, gptq, ffn-hadamard+gptq, quarot, quarot-rtn, spinquant,
            spinquant-rtn; each under all bits.
        convention: plain takes ranges from minima and maxima; osp clips weights by a search, gives
            attention's output a grid a head and rotates keys, as the scripts of the OSP release do, in
            sequences of 2,048 without BOS.
        table: the rows of the OSP paper's Table 2 or 4, in the convention osp.
        seeds: of the random rotations of quarot and spinquant, a row each.
        calibration: text on which gptq and learned rotations look at activations: a UTF-8 file, or the text
            itself; by default what follows the evaluated tokens in their source.
        calibration_tokens: how many tokens of it (the OSP release: 262,144).
        again: measure also what --run holds already.
        token_settings: which tokens to run, under every setting.
        opening: how to open the checkpoint.
        held_out: the tokens that the training which wrote --run held out, in its sequences.
        blocks: path of the list of blocks, where it is not found.
        out: also write the table to this file (.nc, netCDF).
        json: print the table as JSON.

    Examples:
        osp-diag quantize path/to/model --run run.zarr
        osp-diag quantize path/to/model --method rtn ffn-hadamard quarot --bits 4-4-16 4-4-4 --seeds 0 1 2
        osp-diag quantize path/to/model --table 4 --run run.zarr
        osp-diag quantize osp-model --run osp.zarr --held-out --bits 16-16-16 4-4-16 --tokens 65536
        osp-diag quantize model.py:load --ids validation.npy --seq-len 256 --bits W16A16 W8A8
        osp-diag figure bit_width_sweep adam.zarr osp.zarr --out sweep.png
    """
    from osp_diag.cli.quantize_progress import sweep_progress
    from osp_diag.cli.quantize_text import as_rows, as_text
    from osp_diag.quantizing.methods import method_named
    from osp_diag.quantizing.results import (
        HELD_OUT,
        OSP_CONVENTION,
        PLAIN_CONVENTION,
        partial_rounding,
        results_dataset,
    )
    from osp_diag.quantizing.tables import paper_table
    from osp_diag.runs.folder import check_destination
    from osp_diag.runs.run import open_run

    of_paper = None if table is None else paper_table(table)
    rules = convention or (PLAIN_CONVENTION if of_paper is None else OSP_CONVENTION)
    if of_paper is not None and (bits or method or rules != OSP_CONVENTION):
        raise UsageError(
            f"--table {table} says which bits and methods, in the convention osp: leave --bits, --method and "
            "--convention out"
        )
    cases = _cases(bits, method, rules, of_paper, seeds)
    calibrated = any(method_named(case.method).calibrated for case in cases)
    _check(out, token_settings)
    _check_calibration(calibration, calibration_tokens, calibrated)
    if again and run is None:
        raise UsageError("--again measures what --run holds already: give --run")
    holder = None if run is None else open_run(run)
    if run is not None:
        check_destination(run, resume=True)
    measured = [] if holder is None or again else _measured(holder)
    tokens_of_training = _held_out_tokens(holder, token_settings) if held_out else None
    opened = opening.open(checkpoint)
    if holder is not None:
        _check_same_model(holder, opened)
    token_settings = _as_convention(token_settings, rules, opened)
    batches = _batches(opened, token_settings, tokens_of_training)
    training = holder if held_out else None
    look = (
        _calibration(opened, token_settings, batches, calibration, calibration_tokens, training)
        if calibrated
        else None
    )
    rows: list[QuantizedResult] = []
    try:
        with sweep_progress(opened.name) as progress, _writer(run) as store:

            def keep(row: QuantizedResult) -> None:
                rows.append(row)
                store(row)

            results = _measure(
                opened,
                batches.tokens,
                cases,
                calibration=look,
                measured=measured,
                on_result=keep,
                token_source=HELD_OUT if held_out else batches.source,
                model_fingerprint=opened.fingerprint,
                blocks=blocks,
                batch_size=token_settings.batch_size,
                progress=progress,
            )
    except BaseException:
        # Nothing that was measured is lost, also where there is no run, or it cannot be written.
        if rows:
            text = as_text(results_dataset(rows), opened.name, ())
            print(text, file=sys.stderr if json else sys.stdout, flush=True)
        raise
    notes = [*opened.notes, *batches.notes, *filter(None, (partial_rounding(results),))]
    if look is not None:
        notes += filter(None, (look.note(batches.tokens), f"calibrated on {look.description}"))
    text = as_text(results, opened.name, notes, of_paper)
    print(json_format.dumps(as_rows(results, notes), indent=2) if json else text, flush=True)
    if out is not None:
        results.to_netcdf(out)
    if run is not None and not json:
        old = results.sizes["setting"] - len(rows)
        taken = f", {old} of them before" if old else ""
        print(f"\nstored in {run}{taken}   (osp-diag figure bit_width_sweep {run} --out sweep.png)")
    return 0 if all(math.isfinite(value) for value in results["negative_log_likelihood"].values) else 1


def _cases(
    bits: Sequence[str],
    method: Sequence[str],
    convention: str,
    of_paper: PaperTable | None,
    seeds: Sequence[int],
) -> list[Case]:
    from osp_diag.quantizing.cases import SINGLE_SWEEPS, cases_of
    from osp_diag.quantizing.methods import method_named
    from osp_diag.quantizing.results import ROUND_TO_NEAREST
    from osp_diag.quantizing.setting import Setting

    if of_paper is not None:
        return cases_of(of_paper.settings, tuple(of_paper.methods), convention, seeds)
    settings = [Setting.read(entry) for entry in bits] or list(SINGLE_SWEEPS)
    methods = [method_named(name).name for name in method] or [ROUND_TO_NEAREST]
    return cases_of(settings, methods, convention, seeds)


def _measured(holder: Run) -> list[QuantizedResult]:
    """The rows that a run holds already."""
    from osp_diag.quantizing.results import result_rows, results_of
    from osp_diag.schema import QUANTIZATION

    return result_rows(results_of(holder)) if QUANTIZATION in holder.tree.children else []


@contextmanager
def _writer(run: Path | None) -> Iterator[Callable[[QuantizedResult], None]]:
    """What stores a row."""
    from osp_diag.quantizing.results import ResultsWriter

    if run is None:
        yield lambda row: None
    else:
        with ResultsWriter(run) as writer:
            yield writer.add


def _measure(opened: Checkpoint, tokens: Any, cases: list[Case], **options: Any) -> xr.Dataset:
    """The sweep; where memory runs out, what to do about it."""
    import torch

    from osp_diag.quantizing.sweep import sweep

    try:
        return sweep(opened.model, tokens, cases, **options)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _MEMORY.search(str(error)):
            raise
        raise UsageError(
            f"{opened.name} ran out of memory: take fewer sequences a pass (--batch-size 1), shorter ones "
            "(--seq-len), or fewer --calibration-tokens; rounded weights need as much memory again as the "
            "blocks' own. Rows that --run holds are not measured again"
        ) from error


def _as_convention(settings: TokenSettings, convention: str, opened: Checkpoint) -> TokenSettings:
    """Sequences as the convention has them, where the user says nothing else."""
    from osp_diag.quantizing.conventions import convention_named

    rules = convention_named(convention)
    if settings.seq_len is None and rules.sequence_length is not None and settings.ids is None:
        length = min(rules.sequence_length, settings.tokens, opened.max_length or rules.sequence_length)
        settings = replace(settings, seq_len=length)
    if settings.bos == "auto" and not rules.opening_tokens:
        settings = replace(settings, bos="no")
    return settings


def _check(out: Path | None, settings: TokenSettings) -> None:
    """Refuse options that make no sense before a model is opened."""
    check_tokens(settings, fewest=2, why=", so that a token can be predicted")
    if settings.protocol != "sequence":
        raise UsageError(
            f"--protocol {settings.protocol}: perplexity is of real sequences, where a token has a context"
        )
    if out is not None and (out.suffix != ".nc" or not out.parent.is_dir()):
        raise UsageError(f"--out {out}: give a file ending in .nc in a folder that exists")


def _check_calibration(source: str | None, tokens: int, calibrated: bool) -> None:
    if tokens < 1:
        raise UsageError(f"--calibration-tokens {tokens}: give 1 or more")
    if source is not None and not calibrated:
        raise UsageError("--calibration is for methods that look at activations: gptq, quarot and spinquant")


def _batches(opened: Checkpoint, settings: TokenSettings, training_tokens: Any | None) -> TokenBatches:
    """The tokens that are asked for, or those that a training held out."""
    if training_tokens is None:
        return settings.batches(opened)
    from osp_diag.tokens import make_batches

    return make_batches(
        opened.tokenizer,
        ids=training_tokens,
        max_length=opened.max_length,
        vocabulary_size=opened.vocabulary_size,
    )


def _calibration(
    opened: Checkpoint,
    settings: TokenSettings,
    batches: TokenBatches,
    source: str | None,
    tokens: int,
    training: Run | None,
) -> Calibration:
    """A text of the user's own, or what follows the evaluated tokens in their source."""
    from osp_diag.quantizing.calibration import calibration_from, calibration_of

    if source is not None:
        return calibration_from(opened, source, settings, batches, tokens)
    longer = replace(settings, tokens=batches.tokens.size + tokens, seq_len=batches.sequence_length)
    of_training = None if training is None else _held_out_tokens(training, longer)
    following = longer.batches(opened).tokens if of_training is None else of_training
    return calibration_of(following, batches.source, batches.tokens)


def _held_out_tokens(run: Run | None, settings: TokenSettings) -> np.ndarray[Any, Any]:
    """What the training that wrote a run held out."""
    from osp_diag.cli.train_ablation import held_out_tokens

    sources = [name for name in ("text", "dataset", "ids", "random_tokens") if getattr(settings, name)]
    if run is None or sources:
        raise UsageError(
            "--held-out takes the tokens of --run's training: give --run, and no --text, --dataset, --ids or "
            "--random-tokens"
        )
    config = run.attrs.get("config")
    if not config:
        raise UsageError(
            f"--held-out: {run.path} was not written by `osp-diag train`; give --text or --dataset"
        )
    from osp_diag.trainer.config import from_dictionary

    return held_out_tokens(from_dictionary(dict(config)), settings.tokens)


def _check_same_model(run: Run, checkpoint: Checkpoint) -> None:
    """Refuse results of one model in the run of another.

    A run of a training holds no fingerprint of what was exported from it; there, depth and width have to do.
    """
    attributes = run.attrs
    fingerprint = attributes.get("model_fingerprint")
    if fingerprint is not None:
        if fingerprint != checkpoint.fingerprint:
            raise UsageError(
                f"{run.path} is the run of {attributes.get('model_name', 'another model')}, whose weights "
                f"are not those of {checkpoint.name}; give the run that was probed from this checkpoint"
            )
        return
    # Equal sizes do not prove equal weights, but other sizes are another model.
    for name, field in (("number_of_layers", "num_hidden_layers"), ("hidden_size", "hidden_size")):
        size = getattr(checkpoint.config, field, None)
        if size is not None and size != attributes.get(name):
            raise UsageError(
                f"{run.path} is the run of a model with {name.replace('_', ' ')} {attributes.get(name)}, and "
                f"{checkpoint.name} has {size}; give what `osp-diag export {run.path}` writes"
            )
