"""What token ids read as, kept with a run whose statistics name tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.schema import TOKEN_UNIT, VOCABULARY
from osp_diag.text.tokenizer import decode_each

__all__ = ["VOCABULARY", "name_tokens", "vocabulary_dataset"]


def name_tokens(datasets: Iterable[xr.Dataset]) -> bool:
    """Whether any variable holds token ids."""
    return any(v.attrs.get("units") == TOKEN_UNIT for dataset in datasets for v in dataset.data_vars.values())


def vocabulary_dataset(tokenizer: Any, size: int) -> xr.Dataset:
    """The text of each id below ``size``, by ``token_id``.

    The whole vocabulary and not the ids that a step happens to name: later steps name others
    (docs/decisions.md, Estimators).
    """
    texts = np.asarray(decode_each(tokenizer, size), dtype=object)
    attributes = {"long_name": "what a token reads as by itself"}
    return xr.Dataset({"token_text": ("token_id", texts, attributes)}, {"token_id": np.arange(size)})
