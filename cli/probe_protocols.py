"""The OSP kurtosis under both protocols: on real sequences, and as the released OSP script feeds tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from osp_diag.checkpoints import Checkpoint
from osp_diag.probing.checkpoint import probe_checkpoint, progress_bar
from osp_diag.runs.run import Run
from osp_diag.schema import HIDDEN_STATES
from osp_diag.tokens import make_batches

__all__ = ["measure"]


def measure(
    checkpoint: Checkpoint,
    *,
    protocol: str,
    compare: bool,
    tokens: Mapping[str, Any],
    options: Mapping[str, Any],
    main: Mapping[str, Any],
) -> dict[str, Run]:
    """Probe under ``protocol`` and, if ``compare``, measure the OSP kurtosis alone under the other one too.

    Returns the runs by protocol, ``protocol`` first.
    """
    # Two protocols are two runs side by side: docs/decisions.md, Runs.
    runs: dict[str, Run] = {}
    second_protocol = "osp-published" if protocol == "sequence" else "sequence"
    for name in (protocol, second_protocol) if compare else (protocol,):
        present = [site for site in HIDDEN_STATES if not runs or site in runs[protocol].sites]
        if name != protocol:
            if not present:
                break
            # Under the published protocol no sequence has a BOS, whatever the real ones begin with.
            tokens = {**tokens, "bos": "auto"} if name == "osp-published" else tokens
        batches = make_batches(
            checkpoint.tokenizer,
            protocol=name,
            max_length=checkpoint.max_length,
            vocabulary_size=checkpoint.vocabulary_size,
            **tokens,
        )
        arguments = dict(options)
        if name == protocol:
            arguments |= main
        else:
            arguments |= {"sites": present, "estimators": ("osp_excess_kurtosis",), "snapshot_tokens": 0}
        try:
            with progress_bar(f"{checkpoint.name}, {name}") as progress:
                runs[name] = probe_checkpoint(checkpoint, batches, progress=progress, **arguments)
        except KeyboardInterrupt as interruption:
            if runs and main.get("out") is not None:
                interruption.__notes__ = [
                    f"the run in {main['out']} is whole; only the comparison is missing."
                ]
            raise
    return runs
