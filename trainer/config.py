"""What a training run is: nested, frozen, validated configurations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from osp_diag.errors import UsageError
from osp_diag.trainer.config_values import check_at_least, check_positive, check_types, with_changes

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DivergenceConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProbeConfig",
    "ScheduleConfig",
    "TrainConfig",
    "from_dictionary",
]

Norm = Literal["rmsnorm", "ssnorm", "srmsnorm"]
Attention = Literal["softmax", "softmax_off_by_one", "learned_sink", "gated"]
OptimizerName = Literal["adamw", "muon", "muon_only", "soap", "shampoo"]
Destination = Literal["adamw", "muon", "soap", "shampoo"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama, and what OSP and its ablations change in it.

    Attributes
    ----------
    vocabulary_size : entries of the embedding
    hidden_size : width d of the residual stream
    intermediate_size : width of the SwiGLU; None: ⌈(8d/3)/128⌉·128, as OSP has it
    layers, heads : number of blocks, of query heads
    key_value_heads : heads of keys and values (GQA); None: as many as ``heads``
    max_length : longest sequence
    rope_theta : base of the rotary frequencies
    norm : ``rmsnorm`` with a gain per channel; ``ssnorm`` with one scalar; ``srmsnorm`` with none
    norm_scale : initial gain; None: 1, which for ``ssnorm`` is γ = √d in γ·x/‖x‖. What ``srmsnorm`` stays at
    norm_epsilon : added to the mean square
    embedding_projection : d × d after the embedding and before the head, orthogonal at the start
    tie_embeddings : one matrix for embedding and head
    query_key_norm : ``norm`` of every head's queries and keys before the rotation
    attention : softmax; softmax with 1 added to its denominator; with a learned sink logit a head; or
        softmax whose output is multiplied by a sigmoid gate of the block's input, a number a head channel
    initializer_range : standard deviation of normal initial weights
    """

    vocabulary_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int | None = None
    layers: int = 4
    heads: int = 4
    key_value_heads: int | None = None
    max_length: int = 2048
    rope_theta: float = 10_000.0
    norm: Norm = "ssnorm"
    norm_scale: float | None = None
    norm_epsilon: float = 1e-5
    embedding_projection: bool = True
    tie_embeddings: bool = False
    query_key_norm: bool = False
    attention: Attention = "softmax"
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        check_types(self, "model")
        check_at_least(self, "model", 1, "vocabulary_size", "hidden_size", "layers", "heads", "max_length")
        check_positive(self, "model", "rope_theta", "norm_epsilon", "initializer_range")
        for name in ("intermediate_size", "key_value_heads"):
            if getattr(self, name) is not None:
                check_at_least(self, "model", 1, name)
        if self.hidden_size % (2 * self.heads):
            raise UsageError(
                f"model.hidden_size={self.hidden_size} does not make model.heads={self.heads} heads of an "
                f"even width, which rotary embedding needs; take a multiple of {2 * self.heads}"
            )
        if self.heads % self.number_of_key_value_heads:
            raise UsageError(
                f"model.key_value_heads={self.key_value_heads} does not divide model.heads={self.heads}; "
                "every key head serves equally many query heads"
            )

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.heads

    @property
    def number_of_key_value_heads(self) -> int:
        """``key_value_heads`` with its default filled in."""
        return self.heads if self.key_value_heads is None else self.key_value_heads

    @property
    def feed_forward_size(self) -> int:
        """``intermediate_size`` with its default filled in."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return math.ceil(8 * self.hidden_size / 3 / 128) * 128


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which optimizer moves which parameters, and how far.

    Attributes
    ----------
    name : ``adamw`` for all; ``muon`` for hidden matrices with AdamW on embedding and head (OSP's decoupled
        embedding optimisation); ``muon_only`` without Adam; ``soap`` or ``shampoo`` in Muon's place
    lr : peak learning rate
    embedding_lr : of AdamW beside another optimizer; None: ``lr``
    betas, epsilon : AdamW's (and SOAP's)
    weight_decay : decoupled, multiplied by the learning rate; of matrices, never of gains and scalars
    momentum, nesterov : Muon's
    newton_schulz_steps : iterations of the orthogonalisation
    newton_schulz_dtype : ``auto`` takes bfloat16 where the device multiplies it in hardware, else float32
    muon_form : ``torch`` as ``torch.optim.Muon`` (momentum buffer ← β·buffer + (1−β)·g, matrices only), or
        ``osp`` as OSP published it (buffer ← β·buffer + g, and g/‖g‖ for vectors and scalars)
    gradient_clip : largest norm of all gradients together; None: no clipping
    route : parameter pattern (``*norm.weight``) → optimizer, instead of where ``name`` sends it; first match
    """

    name: OptimizerName = "muon"
    lr: float = 2e-3
    embedding_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    momentum: float = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = 5
    newton_schulz_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    muon_form: Literal["torch", "osp"] = "torch"
    gradient_clip: float | None = 1.0
    route: dict[str, Destination] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self, "optimizer")
        check_positive(self, "optimizer", "lr", "epsilon")
        check_at_least(self, "optimizer", 1, "newton_schulz_steps")
        check_at_least(self, "optimizer", 0, "weight_decay", "momentum")
        for name in ("embedding_lr", "gradient_clip"):
            if getattr(self, name) is not None:
                check_positive(self, "optimizer", name)
        for name, values in (("betas", self.betas), ("momentum", (self.momentum,))):
            if not all(0 <= value < 1 for value in values):
                raise UsageError(f"optimizer.{name}={getattr(self, name)}: give values from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run, as a factor of its peak.

    Attributes
    ----------
    name : ``trapezoidal`` (linear warm-up, constant, linear decay; OSP's), ``cosine`` or ``constant``
    warmup : of all steps if below 1, else a number of steps
    decay : the same, of the trapezoid's end
    final : the last step's factor
    """

    name: Literal["trapezoidal", "cosine", "constant"] = "trapezoidal"
    warmup: float = 0.05
    decay: float = 0.2
    final: float = 0.0

    def __post_init__(self) -> None:
        check_types(self, "schedule")
        check_at_least(self, "schedule", 0, "warmup", "decay", "final")
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            if value >= 1 and value != int(value):
                raise UsageError(
                    f"schedule.{name}={value} is neither a fraction of the steps nor a whole number"
                )
        if self.final > 1:
            raise UsageError(f"schedule.final={self.final} is a factor of the peak: give 0 to 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from and how they become sequences.

    Attributes
    ----------
    source : ``builtin`` (the English text that comes along); ``text``, ``jsonl`` or ``parquet`` files;
        ``tokens`` (ids in .npy or raw uint16 .bin, also .bin.xz); ``huggingface`` (streamed); ``mixture``
    path : files or a folder (globs allowed) of the sources that read files
    dataset : hub id or local path of a Hugging Face data set, ``id:configuration`` where it has several
    split : of the data set
    mixture : data set → weight, of the source ``mixture``
    text_column : where JSONL, Parquet and data sets keep their text; None: ``text``, or the only one
    tokenizer : directory, ``tokenizer.json`` or hub id; None: the small BPE that comes along
    sequence_length : positions of a training sequence
    bos : ``document`` begins every document with it, ``sequence`` every sequence, ``none`` nothing
    packing : ``stream`` cuts one stream of documents; ``documents`` begins every sequence with the
        beginning of a document and cuts the one that does not fit any more (none spans two sequences)
    separate_documents : attention does not cross the boundary of a document
    shuffle : sequences in a random order of every epoch; streamed data are shuffled in a buffer
    shuffle_buffer : documents in that buffer
    validation_fraction : of the documents, held out; for ``validation_path`` None
    validation_path : held-out data of the same kind
    seed : of the order
    """

    source: Literal["builtin", "text", "jsonl", "parquet", "tokens", "huggingface", "mixture"] = "builtin"
    path: str | None = None
    dataset: str | None = None
    split: str = "train"
    mixture: dict[str, float] = field(default_factory=dict)
    text_column: str | None = None
    tokenizer: str | None = None
    sequence_length: int = 128
    bos: Literal["document", "sequence", "none"] = "document"
    packing: Literal["stream", "documents"] = "stream"
    separate_documents: bool = False
    shuffle: bool = True
    shuffle_buffer: int = 1024
    validation_fraction: float = 0.02
    validation_path: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "data")
        check_at_least(self, "data", 2, "sequence_length")
        check_at_least(self, "data", 1, "shuffle_buffer")
        if not 0 < self.validation_fraction < 1:
            raise UsageError(
                f"data.validation_fraction={self.validation_fraction}: hold out a part, between 0 and 1"
            )
        key_of = {"text": "path", "jsonl": "path", "parquet": "path", "tokens": "path"}
        key_of |= {"huggingface": "dataset", "mixture": "mixture"}
        name = key_of.get(self.source)
        if name is not None and not getattr(self, name):
            raise UsageError(f"data.{name} is missing, which data.source={self.source} reads")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """When and what to measure while training.

    Attributes
    ----------
    every : a period in steps after ``dense_until``; 0 turns probes off
    dense_until, dense_every : the period up to that step: outliers are born early
    tokens : of the held-out batch that every probe runs, the same at each
    on : ``held_out`` (default), or ``training`` to measure the training step's own forward passes
    sites, estimators : names or patterns; empty: the default ones
    keep_raw : keep the sums behind the numbers
    token_groups : groups of held-out batches whose channel sums are kept apart, for significance; 0: none
    gradients : with ``on=training``: also measure the gradient of the loss with respect to the activations

    Raises
    ------
    UsageError : a number out of range, or gradients of held-out tokens
    """

    every: int = 50
    dense_until: int = 100
    dense_every: int = 10
    tokens: int = 4096
    on: Literal["held_out", "training"] = "held_out"
    sites: tuple[str, ...] = ()
    estimators: tuple[str, ...] = ()
    keep_raw: bool = False
    token_groups: int = 0
    gradients: bool = False

    def __post_init__(self) -> None:
        check_types(self, "probe")
        check_at_least(self, "probe", 0, "every", "dense_until", "token_groups")
        check_at_least(self, "probe", 1, "dense_every", "tokens")
        if self.gradients and self.on == "held_out":
            raise UsageError(
                "probe.gradients=true with probe.on=held_out: held-out tokens are run without gradients; set "
                "probe.on=training, which measures the training steps' own passes"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save all that a resumed run needs.

    Attributes
    ----------
    every : a period in steps; 0 saves at the end alone
    keep : so many of the last checkpoints stay
    ladder : so many older ones stay as well, dense near and sparse far: their distances from the last one
        double from rung to rung, so that n rungs reach back about 2ⁿ⁺¹ periods; 0 keeps the last ones alone.
        A run takes at most keep + ladder checkpoints of the disk, one more while it saves, and what is pinned
    background : write while training goes on
    """

    every: int = 0
    keep: int = 2
    ladder: int = 4
    background: bool = True

    def __post_init__(self) -> None:
        check_types(self, "checkpoint")
        check_at_least(self, "checkpoint", 0, "every", "ladder")
        check_at_least(self, "checkpoint", 1, "keep")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks that ``torchrun`` starts share the work.

    Attributes
    ----------
    mode : ``ddp`` (whole model on every rank), ``fsdp`` (sharded over all), ``hsdp`` (sharded within groups
        of ``shard``, replicated between them)
    shard : ranks of a group under ``hsdp``
    """

    mode: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    shard: int = 1

    def __post_init__(self) -> None:
        check_types(self, "parallel")
        check_at_least(self, "parallel", 1, "shard")
        if self.mode == "hsdp" and self.shard < 2:
            raise UsageError(
                "parallel.shard=1 under parallel.mode=hsdp shards nothing: give 2 or more, or ddp"
            )


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """What to do when a step goes wrong: NaN or Inf in loss or gradients, or a spike of the loss.

    Attributes
    ----------
    policy : ``stop`` (with the state saved and the first bad tensor named), ``skip`` the step, or ``ignore``
    spike : a loss so many standard deviations above the recent mean is a spike; None: no watch for spikes
    window : recent losses
    """

    policy: Literal["stop", "skip", "ignore"] = "stop"
    spike: float | None = None
    window: int = 100

    def __post_init__(self) -> None:
        check_types(self, "divergence")
        check_at_least(self, "divergence", 2, "window")
        if self.spike is not None:
            check_positive(self, "divergence", "spike")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Whether what is recorded is judged while training goes on, and what follows.

    Attributes
    ----------
    on : judge every logged and probed step by the rules of :mod:`osp_diag.monitoring`
    action : ``log`` (say it), ``pin`` (also keep the newest checkpoint before it for good), ``checkpoint``
        (also save the state as it is), or ``stop`` (save it and end)
    webhook : an http or https address to which every finding is posted as JSON; as a secret it is in no run
        and no checkpoint, so that a training that goes on from one is told it again
    """

    on: bool = True
    action: Literal["log", "pin", "checkpoint", "stop"] = "log"
    webhook: str | None = None

    def __post_init__(self) -> None:
        check_types(self, "monitor")
        if self.webhook is not None:
            address = urlsplit(self.webhook)
            if address.scheme not in ("http", "https") or not address.netloc:
                raise UsageError(
                    f"monitor.webhook={self.webhook!r} is no address to post to; give one that begins with "
                    "http:// or https://"
                )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes
    ----------
    name : of the recipe
    steps : optimizer steps
    batch_size : sequences of a step, over all ranks and micro-batches
    micro_batch_size : sequences of one forward pass on one rank; None: all of the rank's at once
    seed : of the initial weights; ``data.seed`` decides the order of the data
    dtype : ``bfloat16`` runs matrices under autocast; weights and optimizer stay float32
    device : ``auto``, ``cpu``, ``cuda``
    compile : blocks and loss
    activation_checkpointing : of the blocks
    log_every : scalars (loss, learning rate, norms, throughput) are recorded every so many steps
    sketch_every : steps between sketches of the weights, taken where scalars are recorded, and at every probe
        and checkpoint; 0: none; None: 1 up to 10M parameters, else once in 2^20 tokens
    """

    name: str = "osp"
    steps: int = 400
    batch_size: int = 16
    micro_batch_size: int | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    log_every: int = 1
    sketch_every: int | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        check_types(self, "")
        check_at_least(self, "", 1, "steps", "batch_size", "log_every")
        for name, least in (("micro_batch_size", 1), ("sketch_every", 0)):
            if getattr(self, name) is not None:
                check_at_least(self, "", least, name)
        if self.data.sequence_length > self.model.max_length:
            raise UsageError(
                f"data.sequence_length={self.data.sequence_length} is longer than "
                f"model.max_length={self.model.max_length}; raise the one or lower the other"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.batch_size * self.data.sequence_length


def from_dictionary(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration that :func:`as_dictionary` made these of; absent keys keep their defaults."""
    restored = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return with_changes(TrainConfig(), restored)
