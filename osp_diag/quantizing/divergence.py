"""How far a model's predictions lie from those of the full-precision model: KL(full ‖ quantized) by token."""

from __future__ import annotations

import shutil
import tempfile
from typing import IO

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["ReferencePredictions", "divergence_of", "surprise_and_divergence_of"]

_AT_ONCE = 2**21
"""Logits of each model that are float64 at one time: 16 MiB."""
_MOST_BYTES = 8 * 2**30
"""Of reference logits on disk."""


def divergence_of(
    reference: Float[Tensor, "token vocabulary"], logits: Float[Tensor, "token vocabulary"]
) -> float:
    """Σ_t KL(p_t ‖ q_t) in nats, p the softmax of ``reference`` and q that of ``logits``, in float64."""
    rows = max(1, _AT_ONCE // reference.shape[-1])
    total = 0.0
    for one, other in zip(reference.split(rows), logits.split(rows), strict=True):
        total += _divergence(one.double().log_softmax(-1), other.double().log_softmax(-1))
    return total


def surprise_and_divergence_of(
    reference: Float[Tensor, "token vocabulary"],
    logits: Float[Tensor, "token vocabulary"],
    targets: Int64[Tensor, " token"],
) -> tuple[float, float]:
    """(Σ_t −log q_t(target), Σ_t KL(p_t ‖ q_t)) in nats, the latter as :func:`divergence_of`."""
    rows = max(1, _AT_ONCE // reference.shape[-1])
    surprise, divergence = 0.0, 0.0
    parts = zip(reference.split(rows), logits.split(rows), targets.split(rows), strict=True)
    for one, other, chosen in parts:
        log_q = other.double().log_softmax(-1)
        surprise -= float(log_q.gather(-1, chosen[:, None]).sum())
        divergence += _divergence(one.double().log_softmax(-1), log_q)
    return surprise, divergence


def _divergence(log_p: Tensor, log_q: Tensor) -> float:
    # Where p is 0 so is the term, also where q is 0.
    return float(torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum())


class ReferencePredictions:
    """The logits of the full-precision model, sequence by sequence, in a temporary file.

    They are kept to the bit, in the model's own dtype, and read again a few tokens at a time. Of long texts
    those of the first sequences only: up to 8 GiB, and up to half of what is free where temporary files lie
    (``TMPDIR``).
    Use it as a context manager, which removes the file.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="osp-diag-reference-")  # noqa: SIM115
        self._left = min(_MOST_BYTES, shutil.disk_usage(tempfile.gettempdir()).free // 2)
        self._shapes: list[tuple[int, int]] = []
        self._dtype = torch.float32
        self._next = 0
        self.complete = False
        """whether the full-precision model has run, so that others are compared with it"""

    def __enter__(self) -> ReferencePredictions:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        """Sequences whose logits are here: the first ones."""
        return len(self._shapes)

    def add(self, logits: Float[Tensor, "token vocabulary"]) -> bool:
        """Keep the logits of the full-precision model's next sequence, and say whether there is room."""
        size = logits.numel() * logits.element_size()
        if size > self._left:
            self._left = 0  # so that what is here are the first sequences, without gaps
            return False
        self._left -= size
        self._dtype = logits.dtype
        self._shapes.append((logits.shape[0], logits.shape[1]))
        logits.detach().cpu().contiguous().view(torch.uint8).numpy().tofile(self._file)
        return True

    def rewind(self) -> None:
        """Begin again at the first sequence."""
        self._file.seek(0)
        self._next = 0

    def divergence(self, logits: Float[Tensor, "token vocabulary"]) -> float:
        """Σ_t KL of the next sequence in nats; NaN where its reference was not kept."""
        if self._next >= len(self._shapes):
            return float("nan")
        vocabulary = self._shapes[self._next][1]
        self._next += 1
        rows, total = max(1, _AT_ONCE // vocabulary), 0.0
        for part in logits.split(rows):
            size = len(part) * vocabulary * part.element_size()
            raw = np.fromfile(self._file, dtype=np.uint8, count=size)
            reference = torch.from_numpy(raw).view(self._dtype).reshape(len(part), vocabulary)
            total += divergence_of(reference.to(part.device), part)
        return total
