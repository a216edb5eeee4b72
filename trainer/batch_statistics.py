"""What a training step read: which batch it was, and how varied; counted on the host, over all ranks."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from osp_diag.trainer.data.batch import IGNORED, Batch
from osp_diag.trainer.data.training_data import Dealing

__all__ = ["BATCH_SERIES", "BatchCounts"]

_DEFINITIONS = {
    "batch_hash": (
        "1",
        "48 bits of BLAKE2b of the batch's token ids and labels, over all ranks and in order; 0 to 2^48 − 1",
    ),
    "data_position": ("sequences", "sequences that the data had handed out after the batch, over all ranks"),
    "unique_token_share": ("1", "different tokens / tokens, among inputs with a label"),
    "commonest_token_share": ("1", "share of the commonest token among inputs with a label"),
    "repeated_bigram_share": ("1", "share of pairs (input, label) that their sequence has before"),
    "repeated_sequence_share": ("1", "1 − different sequences / sequences"),
    "label_agreement": (
        "1",
        "share of labels that are the next input, where there is one; 1 of any text, as documents end with "
        "labels that are ignored",
    ),
}
BATCH_SERIES = {
    name: {"units": units, "definition": definition} for name, (units, definition) in _DEFINITIONS.items()
}
"""Series → what the run says of it."""

_HASH_BYTES = 6
"""48 bits: a float64 holds such an integer exactly."""


class BatchCounts:
    """Counts of a rank's part of a batch, which add up over the ranks, and what follows from the sums.

    Parameters
    ----------
    vocabulary_size : every id is below it
    dealing : which sequences of the batch are this rank's
    """

    def __init__(self, vocabulary_size: int, dealing: Dealing) -> None:
        self._vocabulary_size, self._dealing = vocabulary_size, dealing

    def of(self, batch: Batch) -> Float64[Tensor, " count"]:
        """The counts of this rank's sequences, whole numbers: to be summed over the ranks.

        Occurrences of every token, a hash of every sequence (0 of those of other ranks), and numbers of
        labels, of those with a next input, of those that equal it, and of repeated bigrams.
        """
        ids, labels = (part.numpy().astype("<i8", copy=False) for part in (batch.input_ids, batch.labels))
        has_label = labels != IGNORED
        occurrences = np.bincount(ids[has_label], minlength=self._vocabulary_size)
        hashes = np.zeros(self._dealing.batch_size)
        hashes[self._dealing.of_rank] = [
            _hash(sequence.tobytes() + of_it.tobytes()) for sequence, of_it in zip(ids, labels, strict=True)
        ]
        followed = has_label[:, :-1]
        agreeing = followed & (labels[:, :-1] == ids[:, 1:])
        # Negative and of its own at every position without a label, so that it repeats nothing.
        none = -1 - np.arange(ids.shape[1])
        bigrams = np.sort(np.where(has_label, (ids << 32) + labels, none), axis=1)
        repeated = (bigrams[:, 1:] == bigrams[:, :-1]).sum()
        numbers = [has_label.sum(), followed.sum(), agreeing.sum(), repeated]
        return torch.from_numpy(np.concatenate([occurrences, hashes, numbers]).astype(np.float64))

    def statistics(self, sums: Float64[np.ndarray, " count"], position: float) -> dict[str, float]:
        """The series of :data:`BATCH_SERIES` from the sums over all ranks; NaN where nothing was counted.

        ``position`` is that of the data after the batch.
        """
        size, sequences = self._vocabulary_size, self._dealing.batch_size
        occurrences, hashes = sums[:size], sums[size : size + sequences]
        labels, followed, agreeing, repeated = sums[size + sequences :].tolist()
        return {
            "batch_hash": float(_hash(hashes.astype("<i8").tobytes())),
            "data_position": position,
            "unique_token_share": _share(np.count_nonzero(occurrences), labels),
            "commonest_token_share": _share(occurrences.max(), labels),
            "repeated_bigram_share": _share(repeated, labels),
            "repeated_sequence_share": 1 - len(np.unique(hashes)) / sequences,
            "label_agreement": _share(agreeing, followed),
        }


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=_HASH_BYTES).digest(), "little")


def _share(part: float, whole: float) -> float:
    return float(part) / whole if whole else float("nan")
