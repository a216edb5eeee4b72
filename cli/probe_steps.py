"""The checkpoints of one training, as ``osp-diag probe`` measures them: one run over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from osp_diag.checkpoints.series import StepCheckpoint, checkpoints_of, is_model
from osp_diag.checkpoints.step_names import checkpoints_in
from osp_diag.errors import UsageError
from osp_diag.probing.settings import MeasurementSettings, OpeningSettings, TokenSettings

if TYPE_CHECKING:
    from osp_diag.checkpoints import Checkpoint
    from osp_diag.runs.run import Run
    from osp_diag.schema import Protocol

__all__ = ["Series", "series_of"]


@dataclass(frozen=True)
class Series:
    """Checkpoints that were named, and how."""

    sources: tuple[str, ...]
    steps: tuple[int, ...] | None
    revisions: tuple[str, ...] | None
    members: tuple[StepCheckpoint, ...]

    def opened(self, member: StepCheckpoint, opening: OpeningSettings) -> Checkpoint:
        """One of them, opened."""
        return replace(opening, revision=member.revision).open(member.source)

    def measure(
        self,
        token_settings: TokenSettings,
        measurement_settings: MeasurementSettings,
        opening: OpeningSettings,
        *,
        compare: bool,
        out: Path | None,
        overwrite: bool,
        resume: bool,
    ) -> dict[Protocol, Run]:
        """One run over steps and, if ``compare``, the OSP kurtosis of the last under the other protocol."""
        from osp_diag.cli.probe_protocols import run_is_whole, under_other_protocol
        from osp_diag.probing.checkpoint import progress_bar
        from osp_diag.probing.series import probe_series

        run = probe_series(
            self.sources,
            token_settings,
            measurement_settings,
            steps=self.steps,
            revisions=self.revisions,
            out=out,
            overwrite=overwrite,
            resume=resume,
            progress=progress_bar,
            **opening.keywords(),
        )
        runs: dict[Protocol, Run] = {token_settings.protocol: run}
        last = self.members[-1]
        if not compare or last.step != int(run.steps[-1]):
            return runs
        with run_is_whole(out):
            checkpoint = self.opened(last, opening)
            return runs | under_other_protocol(checkpoint, token_settings, measurement_settings, run)


def series_of(
    sources: Sequence[str],
    *,
    steps: Sequence[int],
    revisions: Sequence[str],
    resume: bool,
    only_of_one: Mapping[str, bool],
) -> Series | None:
    """The checkpoints of a training, if it is such that are named; None for a single checkpoint.

    Parameters
    ----------
    only_of_one : option → whether it was given, of those that a series does not take

    Raises
    ------
    UsageError, CheckpointError : see :func:`osp_diag.checkpoints.series.checkpoints_of`
    """
    if not sources:
        raise UsageError("probe: which checkpoint? Give a path, a hub id or module:function")
    if len(sources) == 1 and not (steps or revisions or resume or _holds_checkpoints_alone(sources[0])):
        return None
    members = checkpoints_of(sources, steps=steps or None, revisions=revisions or None)
    refused = [option for option, is_given in only_of_one.items() if is_given]
    if refused:
        raise UsageError(
            f"{refused[0]} is for one checkpoint, and these are the checkpoints of a training; leave it out, "
            "or probe one of them alone"
        )
    return Series(tuple(sources), tuple(steps) or None, tuple(revisions) or None, members)


def _holds_checkpoints_alone(source: str) -> bool:
    return not is_model(source) and bool(checkpoints_in(source))
