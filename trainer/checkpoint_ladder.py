"""Which checkpoints stay: the last ones, and a ladder of older ones, dense near and sparse far."""

from __future__ import annotations

from collections.abc import Collection

from osp_diag.trainer.config import CheckpointConfig

__all__ = ["WIDEST", "rungs", "staying"]

WIDEST = 4
"""From one rung to the next the distance from the newest checkpoint grows at most so many times, unless
there was no save between them. In the mean it then doubles (docs/decisions.md, Training)."""


def staying(steps: Collection[int], config: CheckpointConfig) -> set[int]:
    """The steps whose checkpoints stay: the last ``keep``, and at most ``ladder`` older ones."""
    ordered = sorted(steps)
    last, older = ordered[-config.keep :], ordered[: -config.keep]
    return {*last, *rungs(older, last[0], last[-1], config.ladder)} if last else set()


def rungs(older: Collection[int], nearest: int, newest: int, most: int) -> list[int]:
    """A ladder of at most ``most`` of the ``older`` steps, from near to far.

    From a step at distance d of ``newest`` the next rung is the oldest one that lies within 4·d; where none
    does, the next older one. Both distances grow alike with every later save, so their ratio falls: a ladder
    that was thinned again and again has no wider gaps than a new one, and a rung goes once its neighbours
    have come within 4 of one another.

    Parameters
    ----------
    older : steps before ``nearest``
    nearest : the oldest step that stays anyway
    newest : the step from which distances count
    most : number of rungs

    Returns
    -------
    list of int : steps, falling
    """
    chosen: list[int] = []
    left = sorted(older, reverse=True)
    step = nearest
    while left and len(chosen) < most:
        within = [one for one in left if newest - one <= WIDEST * (newest - step)]
        step = within[-1] if within else left[0]
        chosen.append(step)
        left = [one for one in left if one < step]
    return chosen
