"""A checkpoint as lm-eval takes models: log-likelihoods of continuations, and greedy generation.

Log-probabilities are float64, whatever the dtype of the logits. Shorter sequences of a batch are padded at
the end, where no prediction of a causal model sees it, so that nothing but logits is asked of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from osp_diag.checkpoints.checkpoint import Checkpoint
from osp_diag.errors import TokenError, UsageError
from osp_diag.probing.feeding import CPU_TOKENS, GPU_TOKENS
from osp_diag.quantizing.perplexity import logits_of
from osp_diag.text.tokenizer import encode, opening_tokens

__all__ = ["CheckpointModel"]

try:
    from lm_eval.api.model import TemplateLM
except ModuleNotFoundError:  # as loading tasks says, which comes before
    TemplateLM = object
_Harness: Any = TemplateLM

_GENERATED = 256
"""Tokens of an answer where the task does not say how many: lm-eval's own default."""


class CheckpointModel(_Harness):
    """The model of an opened checkpoint.

    Parameters
    ----------
    checkpoint : with its tokenizer; of its model the logits are asked, in evaluation mode
    bos : whether sequences begin with the beginning-of-sequence token: ``no``, ``yes``, or ``auto`` as the
        tokenizer does
    max_length : longest sequence; None: as long as the checkpoint allows
    batch_size : sequences a forward pass; None: about 1,024 tokens, 8,192 on a GPU

    Attributes
    ----------
    opening : what every sequence begins with
    max_length : longest sequence, None where there is no limit
    truncated : requests of which the beginning was cut off, since they were longer than that

    Raises
    ------
    UsageError, TokenError : no tokenizer, or no such token; lengths that make no sense
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        bos: str = "auto",
        max_length: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if checkpoint.tokenizer is None:
            raise TokenError(
                f"{checkpoint.name} has no tokenizer, and tasks are texts; name one (--tokenizer PATH)"
            )
        limits = [length for length in (max_length, checkpoint.max_length) if length is not None]
        if max_length is not None and not 2 <= max_length <= min(limits):
            raise UsageError(f"max_length={max_length}: {checkpoint.name} takes 2 to {min(limits):,} tokens")
        self.checkpoint = checkpoint
        self.tokenizer = checkpoint.tokenizer
        self.opening = opening_tokens(checkpoint.tokenizer, bos)
        self.max_length = min(limits, default=None)
        self.truncated = 0
        self._batch_size = batch_size
        self._device = next(p.device for p in checkpoint.model.parameters())

    # -- tokens ------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return getattr(self.tokenizer, "eos_token_id", None)

    @property
    def prefix_token_id(self) -> int:
        """What a continuation without a context follows: BOS, or else the end of a text."""
        beginning = getattr(self.tokenizer, "bos_token_id", None)
        token = self.eot_token_id if beginning is None else beginning
        if token is None:
            raise TokenError(
                "a task asks for the probability of a text without a context, and the tokenizer of "
                f"{self.checkpoint.name} has neither a BOS nor an EOS token for it to follow"
            )
        return int(token)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; the opening tokens before it, unless ``add_special_tokens`` is False."""
        ids = encode(self.tokenizer, string, special=False)
        return ids if add_special_tokens is False else [*self.opening, *ids]

    # -- log-likelihoods ---------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the log-probability, and whether greedy decoding would give it."""
        asked: dict[tuple[int, ...], list[int]] = {}
        for index, (_text, context, continuation) in enumerate(requests):
            ids = self._cut([*context, *continuation], len(continuation))
            # Answers of one token have their question in common, which is run once.
            asked.setdefault(tuple(ids[:-1]), []).append(index)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for rows in self._batches(list(asked)):
            logits = self._logits(rows)
            for row, scores in zip(rows, logits, strict=True):
                for index in asked[row]:
                    answers[index] = _answer(scores[: len(row)], requests[index][2])
        return answers

    def _cut(self, ids: list[int], kept: int) -> list[int]:
        """The end of a sequence of which all but the last token are fed."""
        if self.max_length is None or len(ids) <= self.max_length + 1:
            return ids
        if kept > self.max_length:
            raise UsageError(
                f"an answer of {kept:,} tokens is longer than the {self.max_length:,} that "
                f"{self.checkpoint.name} takes"
            )
        self.truncated += 1
        return ids[-(self.max_length + 1) :]

    def _batches(self, rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Sequences of like lengths together, the longest first, so that memory fails at once."""
        budget = CPU_TOKENS if self._device.type == "cpu" else GPU_TOKENS
        rows = sorted(rows, key=len, reverse=True)
        start = 0
        while start < len(rows):
            size = self._batch_size or max(1, budget // max(1, len(rows[start])))
            yield rows[start : start + size]
            start += size

    def _logits(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, "sequence position entry"]:
        """Of rows filled up at the end with an id that the model knows."""
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[row[0]] * (longest - len(row))] for row in rows])
        with torch.no_grad():
            return logits_of(self.checkpoint.model, ids)[0]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Not done: perplexity of whole texts is no accuracy.

        Raises
        ------
        UsageError : always
        """
        raise UsageError(
            "the task asks for the perplexity of whole texts, which is no accuracy; `osp-diag quantize "
            "CHECKPOINT --text FILE` measures it"
        )

    # -- generation --------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context, up to the first of its stop texts, which is left out."""
        answers = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[tuple[int, tuple[int, ...]]]] = {}
        for index, request in enumerate(requests):
            context, options = request.args
            stops, most = _generation(options)
            ids = self.tok_encode(context) or [self.prefix_token_id]
            room = None if self.max_length is None else self.max_length - most
            if room is not None and room < 1:
                raise UsageError(
                    f"a task generates {most:,} tokens, and {self.checkpoint.name} takes {self.max_length:,} "
                    "in all; there is no room for a question"
                )
            if room is not None and len(ids) > room:
                self.truncated += 1
                ids = ids[-room:]
            groups.setdefault((most, stops), []).append((index, tuple(ids)))
        for (most, stops), members in groups.items():
            places: dict[tuple[int, ...], list[int]] = {}
            for index, row in members:
                places.setdefault(row, []).append(index)
            for rows in self._batches(list(places)):
                for row, text in zip(rows, self._continued(rows, most, stops), strict=True):
                    for index in places[row]:
                        answers[index] = text
        return answers

    def _continued(self, rows: list[tuple[int, ...]], most: int, stops: tuple[str, ...]) -> list[str]:
        """All rows grow by a token a pass, each at its own end.

        The whole sequences are run each time: a cache of keys and values is a matter of each
        implementation, and so is what padding at the front does to it.
        """
        grown = [list(row) for row in rows]
        texts, open_rows = [""] * len(rows), list(range(len(rows)))
        for _ in range(most):
            if not open_rows:
                break
            logits = self._logits([grown[index] for index in open_rows])
            ends = torch.tensor([len(grown[index]) - 1 for index in open_rows], device=logits.device)
            chosen = logits[torch.arange(len(open_rows), device=logits.device), ends].argmax(-1).tolist()
            still_open = []
            for index, token in zip(open_rows, chosen, strict=True):
                if token == self.eot_token_id:
                    continue
                grown[index].append(token)
                text = self.tokenizer.decode(grown[index][len(rows[index]) :])
                texts[index], stopped = _until(text, stops)
                if not stopped:
                    still_open.append(index)
            open_rows = still_open
        return texts


def _answer(logits: Float[Tensor, "position entry"], continuation: list[int]) -> tuple[float, bool]:
    """log p of the continuation, whose last token is predicted by the last row."""
    scores = logits[-len(continuation) :].double().log_softmax(-1)
    targets = torch.tensor(continuation, device=scores.device)
    chosen = scores.gather(1, targets[:, None])
    greedy = bool((scores.argmax(-1) == targets).all())
    return float(chosen.sum()), greedy


def _generation(options: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """(stop texts, most tokens) of the options of a request."""
    until = options.get("until") or []
    if options.get("do_sample") and options.get("temperature", 1.0):
        raise UsageError(
            "the task draws its answers at random (do_sample); only greedy answers are given here, which "
            "are the same each time"
        )
    stops = (until,) if isinstance(until, str) else tuple(until)
    most = next((options[name] for name in ("max_gen_toks", "max_new_tokens") if name in options), _GENERATED)
    return stops, int(most)


def _until(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first stop in it, and whether there was one."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
