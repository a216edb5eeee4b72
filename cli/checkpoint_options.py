"""The options that verbs share which open a checkpoint and run it on tokens.

Their home is :mod:`osp_diag.probing.settings`: the fields are the options, their documentation the help.
"""

from __future__ import annotations

from typing import Annotated

import tyro

from osp_diag.errors import UsageError
from osp_diag.probing.settings import OpeningSettings, TokenSettings

__all__ = [
    "DEFAULT_OPENING",
    "DEFAULT_TOKENS",
    "CheckpointName",
    "CheckpointNames",
    "Opening",
    "Tokens",
    "check_tokens",
]

CheckpointName = Annotated[str, tyro.conf.arg(metavar="CHECKPOINT")]
CheckpointNames = Annotated[tuple[str, ...], tyro.conf.arg(metavar="CHECKPOINT...")]
Tokens = Annotated[TokenSettings, tyro.conf.arg(name="")]
Opening = Annotated[OpeningSettings, tyro.conf.arg(name="")]

DEFAULT_TOKENS, DEFAULT_OPENING = TokenSettings(), OpeningSettings()


def check_tokens(settings: TokenSettings, *, fewest: int = 1, why: str = "") -> None:
    """Refuse what cannot be meant before a model is opened.

    Raises
    ------
    UsageError : a number is below the fewest that make sense
    """
    for name, least in (("tokens", fewest), ("seq_len", fewest), ("batch_size", 1)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give {least} or more{why}")
