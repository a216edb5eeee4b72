"""``osp-diag control``: another schedule or other sites for a run that is being trained."""

from __future__ import annotations

import dataclasses
import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from osp_diag.errors import UsageError

if TYPE_CHECKING:
    from osp_diag.runs.control import Probing

VERB = "control"
HELP = "change what a running training measures, save or stop it, without a restart"

RunPath = Annotated[Path, tyro.conf.arg(metavar="RUN")]


def run(
    controlled: RunPath,
    /,
    *,
    every: int | None = None,
    sites: tuple[str, ...] = (),
    on: bool = False,
    off: bool = False,
    reset: bool = False,
    checkpoint_now: bool = False,
    pin: int | None = None,
    stop: bool = False,
    wait: float = 60.0,
    json: bool = False,
) -> int:
    """Change what a running training measures, have it save or pin a checkpoint, or end it.

    It holds from the next step on, on all ranks alike, and the run notes it. The training may be `osp-diag
    train`, a callback in another trainer, or a loop with osp_diag.Probe; pins are for the first alone, and a
    loop with a Probe has neither checkpoints nor an end of ours. A run that is resumed goes by its
    configuration again. The exit code is 1 if something was refused.

    Args:
        controlled: the run that is being written.
        every: probe every so many steps from now on, and the last one; switches probes on.
        sites: measure these sites alone, names or patterns; those that come new read NaN before.
        on: switch probes on again, by the schedule before.
        off: switch probes off.
        reset: back to the schedule and sites of the configuration.
        checkpoint_now: save the state after the step under way.
        pin: keep the newest checkpoint at or before this step for good.
        stop: save the state and end; --resume goes on from there.
        wait: seconds to wait for the step under way; then the request is withdrawn.
        json: print the answer as JSON.

    Examples:
        osp-diag control runs/osp.zarr --every 10 --sites residual_post attention
        osp-diag control runs/osp.zarr --reset
        osp-diag control runs/osp.zarr --checkpoint-now --pin 1200
        osp-diag control runs/osp.zarr --stop
    """
    from osp_diag.runs.control import control

    if not 0.1 <= wait <= 86_400:
        raise UsageError(f"control: --wait is a number of seconds from 0.1 to 86400, not {wait:g}")
    answer = control(
        controlled,
        every=every,
        sites=sites or None,
        probing=_probing(on, off, reset),
        checkpoint=checkpoint_now,
        pin=pin,
        stop=stop,
        wait=wait,
    )
    if json:
        print(json_format.dumps(dataclasses.asdict(answer)))
    else:
        for text in answer.done:
            print(f"from step {answer.step} on: {text}")
        for text in answer.refused:
            print(f"refused: {text}")
    return int(bool(answer.refused))


def _probing(on: bool, off: bool, reset: bool) -> Probing | None:
    options: dict[Probing, bool] = {"on": on, "off": off, "reset": reset}
    words = [word for word, is_set in options.items() if is_set]
    if len(words) > 1:
        raise UsageError(f"control: --{' and --'.join(words)} contradict one another; give one")
    return words[0] if words else None
