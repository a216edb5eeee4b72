"""``osp-diag quantize``: what a checkpoint is worth at few bits."""

from __future__ import annotations

import json as json_format
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr

    from osp_diag.checkpoints import Checkpoint
    from osp_diag.runs.run import Run
    from osp_diag.tokens import TokenBatches

__all__ = ["check_same_model"]

VERB = "quantize"
HELP = "measure a checkpoint's perplexity at few bits, and keep it in its run"


def run(
    checkpoint: CheckpointName,
    /,
    *,
    run: Path | None = None,
    widths: tuple[str, ...] = (),
    token_settings: Tokens = DEFAULT_TOKENS,
    opening: Opening = DEFAULT_OPENING,
    held_out: bool = False,
    blocks: str | None = None,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Measure what a checkpoint is worth at few bits: the perplexity of a text under several bit widths.

    Every Linear inside the blocks is rounded to nearest, simulated: weights symmetric per output channel,
    activations asymmetric per token, ranges from minimum and maximum. With --run the results go into the run
    of that checkpoint (which `osp-diag probe` or a training wrote), where the figures bit_width_sweep,
    quantization_scatter and ablation_table find them; a setting measured again is replaced. Compare models on
    the same text and tokenizer only.

    Args:
        checkpoint: what to measure, as `osp-diag probe` takes it; for a training, what `osp-diag export`
            wrote.
        run: the run to add the results to.
        widths: settings such as W4A4 or W8A16, 16 for "as it is"; by default weights from 8 to 3 bits,
            activations from 8 to 4, and W8A8, W4A8, W4A4.
        token_settings: which tokens to run, under every setting.
        opening: how to open the checkpoint.
        held_out: the tokens that the training which wrote --run held out, in its sequences.
        blocks: path of the list of blocks, where it is not found.
        out: also write the table to this file (.nc, netCDF).
        json: print the table as JSON.

    Examples:
        osp-diag quantize path/to/model --run run.zarr
        osp-diag quantize osp-model --run osp.zarr --held-out --widths W16A16 W4A4 --tokens 65536
        osp-diag quantize checkpoint-500 --tokenizer path/to/base-model --dataset reviews.jsonl
        osp-diag quantize model.py:load --ids validation.npy --seq-len 256 --widths W16A16 W8A8
        osp-diag figure bit_width_sweep adam.zarr osp.zarr --out sweep.png
    """
    from osp_diag.probing.checkpoint import progress_bar
    from osp_diag.quantizing.bit_width_sweep import WIDTHS, bit_width_sweep, bit_widths
    from osp_diag.quantizing.results import HELD_OUT, partial_rounding, store_results
    from osp_diag.quantizing.round_to_nearest import check_bits
    from osp_diag.runs.folder import check_destination
    from osp_diag.runs.run import open_run

    settings = [bit_widths(entry) for entry in widths] or list(WIDTHS)
    for bits in settings:
        check_bits(*bits)
    _check(out, token_settings)
    holder = None if run is None else open_run(run)
    if run is not None:
        check_destination(run, resume=True)
    training_tokens = _held_out_tokens(holder, token_settings) if held_out else None
    opened = opening.open(checkpoint)
    if holder is not None:
        check_same_model(holder, opened)
    batches = _batches(opened, token_settings, training_tokens)
    with progress_bar(f"quantizing {opened.name}", unit="settings") as progress:
        results = bit_width_sweep(
            opened.model,
            batches.tokens,
            settings,
            token_source=HELD_OUT if held_out else batches.source,
            model_fingerprint=opened.fingerprint,
            blocks=blocks,
            batch_size=token_settings.batch_size,
            progress=progress,
        )
    notes = (*opened.notes, *batches.notes, *filter(None, (partial_rounding(results),)))
    # Printed before it is stored, so that nothing measured is lost where the run cannot be written.
    print(
        json_format.dumps(_as_rows(results, notes), indent=2)
        if json
        else _as_text(results, opened.name, notes),
        flush=True,
    )
    if out is not None:
        results.to_netcdf(out)
    if run is not None:
        store_results(run, results)
        if not json:
            print(f"\nstored in {run}   (osp-diag figure bit_width_sweep {run} --out sweep.png)")
    return 0 if all(math.isfinite(value) for value in results["negative_log_likelihood"].values) else 1


def _check(out: Path | None, settings: TokenSettings) -> None:
    """Refuse options that make no sense before a model is opened."""
    check_tokens(settings, fewest=2, why=", so that a token can be predicted")
    if settings.protocol != "sequence":
        raise UsageError(
            f"--protocol {settings.protocol}: perplexity is of real sequences, where a token has a context"
        )
    if out is not None and (out.suffix != ".nc" or not out.parent.is_dir()):
        raise UsageError(f"--out {out}: give a file ending in .nc in a folder that exists")


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


def check_same_model(run: Run, checkpoint: Checkpoint) -> None:
    """Refuse results of one model in the run of another.

    A run of a training holds no fingerprint of what was exported from it; there, depth and width have to do.

    Raises
    ------
    UsageError : they differ
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


def _as_rows(results: xr.Dataset, notes: Sequence[str]) -> list[dict[str, object]]:
    """One dictionary a setting, each with the notes; what is not finite is null, which JSON knows."""
    columns = {str(name): values.values.tolist() for name, values in results.data_vars.items()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [
        {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        | ({"notes": list(notes)} if notes else {})
        for row in rows
    ]


def _as_text(results: xr.Dataset, name: str, notes: Sequence[str]) -> str:
    from osp_diag.analyses.few_bits import perplexity_at
    from osp_diag.quantizing.results import UNQUANTIZED, notation

    first = results.isel(setting=0)
    full = perplexity_at(results, UNQUANTIZED, UNQUANTIZED)
    lines = [
        f"{name}: perplexity of {int(first['tokens']):,} tokens ({first['token_source'].item()}, sequences "
        f"of {int(first['sequence_length']):,}), rounded to nearest",
    ]
    for index in range(results.sizes["setting"]):
        row = results.isel(setting=index)
        value = float(row["perplexity"])
        bits = notation(int(row["weight_bits"]), int(row["activation_bits"]))
        times = "" if math.isnan(full) or bits == "W16A16" else f"   {value / full:.4g} × W16A16"
        lines.append(f"  {bits:<8}{value:>14,.4g}{times}")
    return "\n".join([*lines, *(f"Note: {note}" for note in notes)])
