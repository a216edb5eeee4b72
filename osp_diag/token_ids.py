"""Token ids that come from no text: of a file, or drawn at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from osp_diag.errors import TokenError

__all__ = ["integers", "random_ids", "read_ids"]

SEED = 0


def read_ids(path: str | Path) -> np.ndarray:
    """The ids of a ``.npy`` file: integers of shape (token,) or (sequence, position), as they lie there.

    Raises
    ------
    TokenError
        There is no such file, or it holds something else.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise TokenError(f"there is no file of token ids {file}; check the path")
    if file.suffix != ".npy":
        raise TokenError(
            f"{file} is not a .npy file: token ids are one array of integers, as numpy.save writes it"
            + (", and a .npz holds several; save the one that is meant" if file.suffix == ".npz" else "")
        )
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise TokenError(f"{file} cannot be read: {error}") from error
    _check(array, str(file))
    return array


def random_ids(count: int, vocabulary_size: int | None) -> np.ndarray:
    """So many ids, each as likely as any other, the same on every machine.

    Raises
    ------
    TokenError
        The size of the vocabulary is not known.
    """
    if not vocabulary_size:
        raise TokenError(
            "random tokens need a model with an embedding of tokens, whose rows say which ids there are; "
            "this one has none"
        )
    # Philox's raw output, which no release of NumPy may change.
    return (np.random.Philox(key=SEED).random_raw(count) % np.uint64(vocabulary_size)).astype(np.int64)


def integers(values: Any) -> np.ndarray:
    """Ids or masks as int64 of shape (token,) or (sequence, position).

    Raises
    ------
    TokenError
        They are no integers, or of another shape.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    _check(array, "token ids")
    return array.astype(np.int64)


def _check(array: np.ndarray, what: str) -> None:
    if array.dtype.kind not in "iub" or array.ndim not in (1, 2):
        raise TokenError(
            f"token ids are integers of shape (token,) or (sequence, position), not {array.dtype} of shape "
            f"{array.shape}" + ("" if what == "token ids" else f" ({what})")
        )
