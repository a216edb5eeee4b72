"""What a probe is asked for: which tokens, and what to measure. Each option is documented here, once.

Functions take these options as keywords (``sites=["residual_*"]``), as an object, or both, where the keywords
change the object. A new option is a field of the dataclass and a key of the TypedDict beside it, by which
type checkers and editors know the keywords; a test holds the two together.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, TypeVar, cast

from osp_diag.capture.token_kinds import TokenKinds, TokenPlaces
from osp_diag.errors import UsageError
from osp_diag.estimators import estimators_named
from osp_diag.estimators.base import Estimator
from osp_diag.schema import Protocol
from osp_diag.tokens import BeginningOfSequence, TokenBatches, make_batches
from osp_diag.wording import did_you_mean

if TYPE_CHECKING:
    from osp_diag.checkpoints import Checkpoint

__all__ = [
    "EstimatorSelection",
    "MeasurementOptions",
    "MeasurementSettings",
    "OpeningSettings",
    "Settings",
    "TokenOptions",
    "TokenSettings",
    "keyword_form",
]

EstimatorSelection = Sequence[str | Estimator] | Mapping[str, Sequence[str | Estimator]]
"""Estimators by name or instance, for every site or by pattern of sites."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options that are handed on together."""

    def changed(self, options: dict[str, Any]) -> Self:
        """A copy with the ``options`` that belong to it, which are taken out of the dictionary."""
        names = [field.name for field in dataclasses.fields(self) if field.name in options]
        return dataclasses.replace(self, **{name: options.pop(name) for name in names})


@dataclass(frozen=True, kw_only=True)
class TokenSettings(Settings):
    """Which tokens a checkpoint is run on.

    Attributes
    ----------
    text
        a UTF-8 file to read, or the text itself; where neither this nor dataset is named, a built-in
        public-domain text.
    dataset
        a Hugging Face dataset, by hub id or local path (a folder, .jsonl, .json, .parquet, .csv or .txt, also
        compressed).
    split
        of the dataset; by default the first there is of validation, test and train.
    text_column
        of the dataset; by default `text`, or the only column of text.
    ids
        token ids from a .npy file, in place of text: integers of shape (token,) or (sequence, position).
    random_tokens
        ids drawn evenly from the model's vocabulary, in place of text: for a model without a tokenizer. What
        depends on language (sinks, delimiters) is then not that of text.
    tokens
        how many tokens to run.
    seq_len
        tokens a sequence; by default 512, or the model's maximum if that is less.
    batch_size
        sequences a forward pass; by default about 1,024 tokens, 8,192 on a GPU.
    protocol
        real sequences, or every token as a sequence of its own as the released OSP script does.
    bos
        whether sequences begin with the beginning-of-sequence token; auto follows the tokenizer.
    """

    text: str | Path | None = None
    dataset: str | None = None
    split: str | None = None
    text_column: str | None = None
    ids: str | Path | None = None
    random_tokens: bool = False
    tokens: int = 8192
    seq_len: int | None = None
    batch_size: int | None = None
    protocol: Protocol = "sequence"
    bos: BeginningOfSequence = "auto"

    def batches(self, checkpoint: Checkpoint) -> TokenBatches:
        """The sequences for a checkpoint, by its tokenizer: see :func:`osp_diag.tokens.make_batches`.

        Raises
        ------
        TokenError, UsageError : they cannot be made, or do not fit the checkpoint
        """
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del options["batch_size"]
        return make_batches(
            checkpoint.tokenizer,
            max_length=checkpoint.max_length,
            vocabulary_size=checkpoint.vocabulary_size,
            **options,
        )


class TokenOptions(TypedDict, total=False):
    """The keyword form of :class:`TokenSettings`."""

    text: str | Path | None
    dataset: str | None
    split: str | None
    text_column: str | None
    ids: str | Path | None
    random_tokens: bool
    tokens: int
    seq_len: int | None
    batch_size: int | None
    protocol: Protocol
    bos: BeginningOfSequence


@dataclass(frozen=True, kw_only=True)
class OpeningSettings(Settings):
    """How a checkpoint is opened; the keywords of :func:`osp_diag.open_checkpoint`, as one object.

    Attributes
    ----------
    dtype
        of the weights and the forward pass; auto keeps the checkpoint's own.
    device
        auto, cpu, cuda, cuda:1, mps ...
    device_map
        spread a model over devices, as in accelerate (auto, balanced ...).
    attention
        which implementation of attention runs, as in transformers (eager, sdpa ...); by default the one that
        computes what the model was trained with, and of those the fastest.
    tokenizer
        in place of the checkpoint's own: a directory, a tokenizer.json, a SentencePiece .model, a hub id, or
        `module:function` returning one.
    trust_remote_code
        run code that the checkpoint brings along.
    allow_nonfinite
        open it although weights hold NaN or Inf.
    revision
        of a hub repository: a branch, tag or commit, such as step1000; by default the main branch.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    device_map: str | None = None
    attention: str | None = None
    tokenizer: str | Path | None = None
    trust_remote_code: bool = False
    allow_nonfinite: bool = False
    revision: str | None = None

    def open(self, source: str | Path) -> Checkpoint:
        """Open a checkpoint so: see :func:`osp_diag.open_checkpoint`.

        Raises
        ------
        CheckpointError, TokenError, UsageError : it cannot be opened
        """
        from osp_diag.checkpoints import open_checkpoint

        return open_checkpoint(source, **self.keywords())

    def keywords(self) -> dict[str, Any]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class MeasurementSettings(Settings):
    """What is measured, where, and what is kept of it.

    Attributes
    ----------
    sites : names or patterns (``"residual_*"``, ``"linear_input:*"``); None: all but the inputs of single
        projections
    estimators : names, of single ones or of a family such as ``"block_lens"``, or instances, for all sites or
        by pattern of sites; None: the default ones of each site
    delimiter_ids : token ids of the ``delimiter`` stratum; None: those of the tokenizer, and none without one
    stack : of a model of several stacks (encoder and decoder, a vision tower and a language model) the one to
        follow, by a part of its path such as ``"encoder"``; None: the largest
    token_kinds : kinds of tokens that are measured apart, and where each is: ``{"cls": 0, "patch": ...}``,
        see :class:`~osp_diag.capture.token_kinds.TokenKinds`; ``"auto"``: those that the model itself tells
        apart (CLS, registers, patches, images among text); None: none
    blocks, named_sites, example : where the sites cannot be guessed: see :func:`osp_diag.sites.find_sites`
    compile : fold activations with ``torch.compile``; ``"auto"`` does so on CUDA
    keep_raw : also write the sums behind the numbers, so that later definitions apply to old runs
    snapshot_tokens : so many positions of the first sequence have their raw activations kept for pictures
    token_groups : so many groups of forward passes have their channel sums kept apart, by which a comparison
        tells what is significant; 0: none
    gradients : also measure the gradient of the loss with respect to the activations at the sites, in the
        backward passes of training steps; of queries, keys, values and attention there is none

    Raises
    ------
    EstimatorError : no estimator has that name
    UsageError : a single token group, or kinds of tokens that are none
    """

    sites: Sequence[str] | None = None
    estimators: EstimatorSelection | None = None
    delimiter_ids: Sequence[int] | None = None
    stack: str | None = None
    token_kinds: Mapping[str, TokenPlaces] | Literal["auto"] | None = "auto"
    blocks: str | None = None
    named_sites: Mapping[str, str] | None = None
    example: Mapping[str, Any] | tuple[Any, ...] | None = None
    compile: bool | Literal["auto"] = "auto"
    keep_raw: bool = True
    snapshot_tokens: int = 0
    token_groups: int = 0
    gradients: bool = False

    def __post_init__(self) -> None:
        self.estimator_instances()
        self._check_token_kinds()
        if self.token_groups < 0 or self.token_groups == 1:
            raise UsageError(
                f"token_groups={self.token_groups}: a bootstrap over groups of batches needs 2 or more; 0 "
                "keeps none apart"
            )

    def estimator_instances(self) -> Sequence[Estimator] | Mapping[str, Sequence[Estimator]] | None:
        """The estimators, each as an instance; None stands for the default ones."""
        if isinstance(self.estimators, Mapping):
            return {pattern: _instances(entries) for pattern, entries in self.estimators.items()}
        return None if self.estimators is None else _instances(self.estimators)

    def _check_token_kinds(self) -> None:
        if isinstance(self.token_kinds, Mapping):
            TokenKinds(self.token_kinds)
        elif self.token_kinds not in ("auto", None):
            raise UsageError(
                f"token_kinds is {self.token_kinds!r}; give a mapping from each kind to where its tokens are "
                '({"cls": 0, "patch": ...}), "auto" or None'
            )

    def check_held_out(self) -> None:
        """Refuse what only the passes of a training have.

        Raises
        ------
        UsageError : gradients are asked for
        """
        if self.gradients:
            raise UsageError(
                "gradients=True: held-out batches are run without gradients, so there are none to measure; "
                "probe training steps (Probe.step around forward and backward, or on='training' in a trainer)"
            )

    def for_batches(self, batches: TokenBatches) -> Self:
        """With the delimiters of these sequences unless some are named, and no more groups than sequences.

        Raises
        ------
        UsageError : gradients are asked for, which batches that are run without them have not
        """
        self.check_held_out()
        groups = min(self.token_groups, len(batches.tokens))
        delimiters = batches.delimiter_ids if self.delimiter_ids is None else self.delimiter_ids
        return dataclasses.replace(self, delimiter_ids=delimiters, token_groups=groups if groups > 1 else 0)


class MeasurementOptions(TypedDict, total=False):
    """The keyword form of :class:`MeasurementSettings`."""

    sites: Sequence[str] | None
    estimators: EstimatorSelection | None
    delimiter_ids: Sequence[int] | None
    stack: str | None
    token_kinds: Mapping[str, TokenPlaces] | Literal["auto"] | None
    blocks: str | None
    named_sites: Mapping[str, str] | None
    example: Mapping[str, Any] | tuple[Any, ...] | None
    compile: bool | Literal["auto"]
    keep_raw: bool
    snapshot_tokens: int
    token_groups: int
    gradients: bool


def _instances(estimators: Sequence[str | Estimator]) -> list[Estimator]:
    instances: list[Estimator] = []
    for entry in estimators:
        instances += estimators_named(entry) if isinstance(entry, str) else (entry,)
    return instances


Function = TypeVar("Function", bound=Callable[..., Any])


def keyword_form(*sources: Settings | Callable[..., Any]) -> Callable[[Function], Function]:
    """Let a function show and check its ``**options``: ``help`` and notebooks list them, with their defaults.

    Parameters
    ----------
    sources : settings, whose fields are the options and whose values the defaults; or a function, whose
        keywords are. Of options of one name the first counts

    Raises
    ------
    TypeError : from the function, for a keyword that it does not take; the message names the nearest
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = {parameter.name: parameter for parameter in named}
        for source in sources:
            for parameter in _keywords(source):
                parameters.setdefault(parameter.name, parameter)
        ordered = sorted(parameters.values(), key=lambda parameter: parameter.kind)

        @functools.wraps(function)
        def checked(*arguments: Any, **options: Any) -> Any:
            for name in options:
                if name not in parameters:
                    owner = function.__qualname__.removesuffix(".__init__")
                    names = [parameter for parameter in parameters if parameter != "self"]
                    raise TypeError(f"{owner}() takes no {name!r}; {did_you_mean(name, names)}")
            return function(*arguments, **options)

        checked.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
        return cast(Function, checked)

    return decorate


def _keywords(source: Settings | Callable[..., Any]) -> list[inspect.Parameter]:
    function = type(source) if isinstance(source, Settings) else source
    return [
        parameter.replace(default=getattr(source, parameter.name, parameter.default))
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
