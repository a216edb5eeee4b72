"""The OSP kurtosis under both protocols: on real sequences, and as the released OSP script feeds tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from osp_diag.checkpoints import Checkpoint
from osp_diag.probing import MeasurementSettings, TokenSettings
from osp_diag.probing.checkpoint import probe_checkpoint, progress_bar
from osp_diag.runs.run import Run
from osp_diag.schema import HIDDEN_STATES, Protocol

__all__ = ["measure", "run_is_whole", "under_other_protocol"]


def measure(
    checkpoint: Checkpoint,
    token_settings: TokenSettings,
    measurement_settings: MeasurementSettings,
    *,
    compare: bool,
    weights: Sequence[str] | None,
    out: Path | None,
    overwrite: bool,
) -> dict[Protocol, Run]:
    """Probe as asked and, if ``compare``, measure the OSP kurtosis alone under the other protocol too.

    Returns the runs by protocol, ``protocol`` first.
    """
    protocol, batch_size = token_settings.protocol, token_settings.batch_size
    with progress_bar(f"{checkpoint.name}, {protocol}") as progress:
        run = probe_checkpoint(
            checkpoint,
            token_settings.batches(checkpoint),
            measurement_settings,
            batch_size=batch_size,
            weights=weights,
            out=out,
            overwrite=overwrite,
            progress=progress,
        )
    if not compare:
        return {protocol: run}
    with run_is_whole(out):
        return {protocol: run} | under_other_protocol(checkpoint, token_settings, measurement_settings, run)


@contextmanager
def run_is_whole(out: Path | None) -> Iterator[None]:
    """Say in an interruption that the run is written and only its comparison is missing."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        if out is not None:
            interruption.__notes__ = [f"the run in {out} is whole; only the comparison is missing."]
        raise


def under_other_protocol(
    checkpoint: Checkpoint, token_settings: TokenSettings, measurement_settings: MeasurementSettings, run: Run
) -> dict[Protocol, Run]:
    """The OSP kurtosis alone, of the checkpoint whose run under one protocol there is, under the other.

    Nothing where the run has no hidden states.
    """
    protocol, batch_size = token_settings.protocol, token_settings.batch_size
    sites = [site for site in HIDDEN_STATES if site in run.sites]
    if not sites:
        return {}
    other: Protocol = "osp-published" if protocol == "sequence" else "sequence"
    tokens = replace(token_settings, protocol=other)
    if other == "osp-published":  # no sequence has a BOS, whatever the real ones begin with
        tokens = replace(tokens, bos="auto")
    kurtosis = replace(
        measurement_settings,
        sites=sites,
        estimators=("osp_excess_kurtosis",),
        keep_raw=True,
        snapshot_tokens=0,
        token_groups=0,
    )
    batches = tokens.batches(checkpoint)
    with progress_bar(f"{checkpoint.name}, {other}") as progress:
        return {
            other: probe_checkpoint(checkpoint, batches, kurtosis, batch_size=batch_size, progress=progress)
        }
