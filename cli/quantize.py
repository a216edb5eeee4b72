"""``osp-diag quantize``: what a checkpoint is worth at few bits."""

from __future__ import annotations

import json as json_format
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from osp_diag.cli.checkpoint_options import (
    DEFAULT_OPENING,
    DEFAULT_TOKENS,
    CheckpointName,
    Opening,
    Tokens,
)
from osp_diag.cli.quantize_inputs import (
    as_convention,
    calibration_tokens_of,
    check_same_model,
    check_sequences,
    evaluated_batches,
    held_out_tokens_of,
    memory_advice,
)
from osp_diag.errors import UsageError
from osp_diag.quantizing.setting import CALIBRATION_TOKENS

if TYPE_CHECKING:
    from osp_diag.checkpoints import Checkpoint
    from osp_diag.quantizing.calibration import Calibration
    from osp_diag.quantizing.cases import Case
    from osp_diag.quantizing.results import QuantizedResult
    from osp_diag.quantizing.tables import PaperTable
    from osp_diag.runs.run import Run

VERB = "quantize"
HELP = "measure a checkpoint's perplexity at few bits, and keep it in its run"


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
    save: Path | None = None,
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
        save: a directory to make, with the quantized checkpoint in the format of compressed-tensors, which
            transformers and vLLM load; of one --bits and one --method (rtn or gptq, which runs once more).
        out: also write the table to this file (.nc, netCDF).
        json: print the table as JSON.

    Examples:
        osp-diag quantize path/to/model --run run.zarr
        osp-diag quantize path/to/model --method rtn ffn-hadamard quarot --bits 4-4-16 4-4-4 --seeds 0 1 2
        osp-diag quantize path/to/model --table 4 --run run.zarr
        osp-diag quantize osp-model --run osp.zarr --held-out --bits 16-16-16 4-4-16 --tokens 65536
        osp-diag quantize checkpoint-500 --tokenizer path/to/base-model --dataset reviews.jsonl
        osp-diag quantize model.py:load --ids validation.npy --seq-len 256 --bits W16A16 W8A8
        osp-diag quantize path/to/model --bits 4-16-16 --method gptq --save model-int4
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
    from osp_diag.quantizing.sweep import sweep
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
    check_sequences(token_settings, calibration_tokens)
    _check(out, calibration, calibrated)
    if save is not None:
        _check_save(save, cases)
    if again and run is None:
        raise UsageError("--again measures what --run holds already: give --run")
    holder = None if run is None else open_run(run)
    if run is not None:
        check_destination(run, resume=True)
    measured = [] if holder is None or again else _measured(holder)
    tokens_of_training = held_out_tokens_of(holder, token_settings) if held_out else None
    opened = opening.open(checkpoint)
    if holder is not None:
        check_same_model(holder, opened)
    token_settings = as_convention(token_settings, rules, opened)
    batches = evaluated_batches(opened, token_settings, tokens_of_training)
    training = holder if held_out else None
    look = (
        calibration_tokens_of(opened, token_settings, batches, calibration, calibration_tokens, training)
        if calibrated
        else None
    )
    rows: list[QuantizedResult] = []
    kept = "Rows that --run holds are not measured again"
    try:
        with sweep_progress(opened.name) as progress, _writer(run) as store, memory_advice(opened.name, kept):

            def keep(row: QuantizedResult) -> None:
                rows.append(row)
                store(row)

            results = sweep(
                opened.model,
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
    if save is not None:
        few = next(case for case in cases if not case.setting.unquantized)
        _save(opened, save, few, look, blocks)
        if not json:
            print(f"\nsaved in {save}   (compressed-tensors: transformers and vLLM load it)")
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


def _check_save(folder: Path, cases: Sequence[Case]) -> None:
    """Refuse what cannot be saved before a model is opened."""
    from osp_diag.quantizing.packed_export import check_exportable

    few = [case for case in cases if not case.setting.unquantized]
    if len(few) != 1:
        raise UsageError(f"--save {folder}: give one --bits and one --method, such as 4-16-16 and gptq")
    check_exportable(few[0].setting, few[0].method, few[0].convention)
    if folder.exists():
        raise UsageError(f"--save {folder}: it is there already; give a folder that is not")


def _save(opened: Checkpoint, folder: Path, case: Case, look: Calibration | None, blocks: str | None) -> None:
    from osp_diag.quantizing.packed_export import save_quantized

    save_quantized(
        opened,
        folder,
        case.setting,
        method=case.method,
        convention=case.convention,
        calibration=None if look is None else look.tokens,
        blocks=blocks,
    )


def _check(out: Path | None, calibration: str | None, calibrated: bool) -> None:
    """Refuse options that make no sense before a model is opened."""
    if out is not None and (out.suffix != ".nc" or not out.parent.is_dir()):
        raise UsageError(f"--out {out}: give a file ending in .nc in a folder that exists")
    if calibration is not None and not calibrated:
        raise UsageError("--calibration is for methods that look at activations: gptq, quarot and spinquant")
