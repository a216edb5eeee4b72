"""The faults: what each is, where it sits, and how it gets into a training.

*Development* faults are those that the rules of monitor and diagnosis were made on, with the seed 0 and the
preset ``tiny``. All else is held out: other seeds (whose edits fall on other layers, rows and heads), other
sizes, faults that were never looked at, and another preset.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.planted_faults import planting as plant
from benchmarks.planted_faults.planting import Edit, Planting
from osp_diag.trainer.config import TrainConfig

__all__ = ["COMPOUND", "FAULTS", "HEALTHY", "Cause", "Fault"]

HEALTHY, COMPOUND = "healthy", "compound"
"""The family of a fault without a cause, and of one with several; else it is its cause's."""

Begins = Literal["healthy", "start", "mid_run"]
Recipe = Literal["osp", "adam", "muon_embproj"]

HIDDEN, PROJECTIONS = "model.layers.*_proj.weight", "*embedding_projection.weight"
EMBEDDING, HEAD, NORMS = "model.embed_tokens.weight", "lm_head.weight", "*norm.weight"


@dataclass(frozen=True)
class Cause:
    """What is wrong.

    Attributes
    ----------
    family : as the diagnosis calls it (:data:`osp_diag.analyses.diagnosis.findings.FAMILIES`)
    text : in a few words
    words : regular expressions, all of which a text matches that names exactly this cause
    parameters : patterns of the names that it touches; empty: of no place
    edit : the part of a weight, where it is one
    """

    family: str
    text: str
    words: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    edit: Edit | None = None


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Attributes
    ----------
    name : unique
    begins : ``mid_run`` after the onset, in a healthy training; ``start`` with its first step; ``healthy``
    causes : none of a healthy one, several of a compound
    raises_kurtosis : whether the kurtosis of hidden states rose within 50 steps when that was first measured,
        with seed 0 and the preset ``tiny``; None: it was not measured
    changes : of the configuration, by dotted key: what a configuration tells of
    times : dotted key → factor of the value there
    silent : what no configuration tells of
    new_segment : it goes on as a new segment of the run, as all declared faults do, and is not resumed
    recipe : of the healthy training
    is_development : the rules were made on it
    """

    name: str
    begins: Begins
    causes: tuple[Cause, ...] = ()
    raises_kurtosis: bool | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    silent: Planting = field(default_factory=Planting)
    new_segment: bool = False
    recipe: Recipe = "osp"
    is_development: bool = True

    @property
    def family(self) -> str:
        """Of its cause; ``compound`` of several, ``healthy`` of none."""
        if len(self.causes) > 1:
            return COMPOUND
        return self.causes[0].family if self.causes else HEALTHY

    @property
    def is_declared(self) -> bool:
        """Whether a configuration tells of it, or of a part of it."""
        return bool(self.changes or self.times)

    def planting(self, config: TrainConfig, seed: int) -> Planting:
        """What is silent about it in a training of this configuration and seed, edits included."""
        edits = [cause.edit.begin(config, seed) for cause in self.causes if cause.edit is not None]

        def begin(training: Any) -> None:
            for change in (*edits, self.silent.begin):
                change(training)

        return replace(self.silent, begin=begin)


# Causes


ADAM_ON_HIDDEN = Cause(
    "optimizer_routing", "AdamW on the hidden matrices", ("adam", "hidden|_proj|muon"), (HIDDEN,)
)
ADAM_ON_PROJECTIONS = Cause(
    "optimizer_routing", "AdamW on the embedding projections", ("adam", "projection"), (PROJECTIONS,)
)
MUON_ON_EMBEDDING = Cause(
    "optimizer_routing", "Muon on embedding and head", ("muon", "embed|head"), (EMBEDDING, HEAD)
)
GAINS = Cause("norm_gain", "a gain per channel in place of one scalar", ("gain|rmsnorm|norm",), (NORMS,))
NO_PROJECTIONS = Cause("projections", "no embedding projections", ("no embedding projection",))
NO_CLIPPING = Cause("clipping", "gradients are not clipped", ("clip",))
SPIKE = Cause("batch", "all labels of one batch are one token", ("label",))
NO_DECAY = Cause("weight_decay", "no weight decay", ("no weight decay|decay.* 0\\b",))
MORE_DECAY = Cause("weight_decay", "weight decay × 30", ("decay", "× 30|0\\.3\\b"))

ADAM = {"optimizer.name": "adamw"}
TO_ADAM_ON_HIDDEN = ADAM | {"optimizer.route": {PROJECTIONS: "muon"}}
TO_ADAM_ON_PROJECTIONS = ADAM | {"optimizer.route": {HIDDEN: "muon"}}
TO_MUON_ON_EMBEDDING = {"optimizer.name": "muon_only", "optimizer.route": {NORMS: "adamw"}}
TO_GAINS = {"model.norm": "rmsnorm"}
TO_NO_PROJECTIONS = {"model.embedding_projection": False}
WITHOUT_CLIPPING = {"optimizer.gradient_clip": None}
WITHOUT_DECAY = {"optimizer.weight_decay": 0.0}


def _rate(factor: float) -> Cause:
    return Cause("learning_rate", f"learning rate × {factor:g}", ("learning.rate", rf"\b{factor:g}\b"))


def _data(text: str, *words: str) -> Cause:
    return Cause("data", text, words)


def _rotary(base: float) -> Cause:
    return Cause("function", f"base of the rotary frequencies {base:g}", ("rope|rotary", rf"\b{base:g}\b"))


def _edited(edit: Edit) -> Cause:
    part = "all of " if edit.axis == "all" else f"a {edit.axis} of "
    family = "norm_gain" if "norm" in edit.parameter else "weight_edit"
    module = edit.parameter.split(".")[-2]
    words = (module, r"\ball\b|matrix|whole") if edit.axis == "all" else (module, edit.axis)
    return Cause(family, f"{part}{module} × {edit.factor:g}", words, (), edit)


def _development() -> Iterable[Fault]:
    """The faults that monitor and diagnosis were written with."""
    gain = Edit("model.layers.{layer}.input_layernorm.weight", "channel", 8, "attention_input", 2, 37)
    embedding = Edit(EMBEDDING, "row", 30, "embedding", None, 324)
    down = Edit("model.layers.{layer}.mlp.down_proj.weight", "row", 10, "mlp_contribution", 1, 77)
    key = Edit("model.layers.{layer}.self_attn.k_proj.weight", "head", 6, "key_pre_rope", 2, 2)
    swap = (ADAM_ON_HIDDEN, GAINS, NO_PROJECTIONS)
    off, decay_silently = WITHOUT_DECAY, Planting(plant.set_decay(0.0))
    yield from (
        Fault("learning_rate_x10", "mid_run", (_rate(10),), True, times={"optimizer.lr": 10}),
        Fault("learning_rate_x10_silent", "mid_run", (_rate(10),), True,
              silent=Planting(plant.multiply_rates(10))),
        Fault("gains", "mid_run", (GAINS,), False, TO_GAINS),
        Fault("no_projections", "mid_run", (NO_PROJECTIONS,), False, TO_NO_PROJECTIONS),
        Fault("adam_swap", "mid_run", swap, True, ADAM | TO_GAINS | TO_NO_PROJECTIONS),
        Fault("adam_on_hidden", "mid_run", (ADAM_ON_HIDDEN,), False, TO_ADAM_ON_HIDDEN),
        Fault("adam_on_projections", "mid_run", (ADAM_ON_PROJECTIONS,), True, TO_ADAM_ON_PROJECTIONS),
        Fault("muon_on_embedding", "mid_run", (MUON_ON_EMBEDDING,), True, TO_MUON_ON_EMBEDDING),
        Fault("gain_channel_x8", "mid_run", (_edited(gain),), False, recipe="muon_embproj"),
        Fault("embedding_row_x30", "mid_run", (_edited(embedding),), False),
        Fault("down_row_x10", "mid_run", (_edited(down),), True),
        Fault("key_head_x6", "mid_run", (_edited(key),), False),
        Fault("rotary_base_100", "mid_run", (_rotary(100),), False,
              silent=Planting(code=plant.rotary_base(100))),
        Fault("random_tokens", "mid_run", (_data("random tokens", "random|not text"),), False,
              silent=Planting(batch=plant.random_tokens)),
        Fault("repeated_document", "mid_run", (_data("one document, repeated", "repeat"),), False,
              silent=Planting(batch=plant.repeated_document)),
        Fault("spike_unclipped", "mid_run", (NO_CLIPPING, SPIKE), False, WITHOUT_CLIPPING,
              silent=Planting(batch=plant.spike)),
        Fault("one_token_batch", "mid_run", (Cause("batch", "a batch of one token", ("one token",)),), False,
              silent=Planting(batch=plant.one_token)),
        Fault("bfloat16_weights", "mid_run", (Cause("precision", "weights in bfloat16", ("bf(loat)?.?16",)),),
              False, silent=Planting(plant.round_weights)),
        Fault("no_decay_silent", "mid_run", (NO_DECAY,), False, silent=decay_silently),
        Fault("no_decay", "mid_run", (NO_DECAY,), False, off),
        Fault("adam_on_hidden_from_start", "start", (ADAM_ON_HIDDEN,), True, TO_ADAM_ON_HIDDEN),
        Fault("adam_swap_from_start", "start", swap, True, ADAM | TO_GAINS | TO_NO_PROJECTIONS),
    )  # fmt: skip


def _held_out() -> Iterable[Fault]:
    """Other sizes, other places, and faults that no rule was made on."""
    layer = "model.layers.{layer}."
    edits = {
        "gain_channel_x3": Edit(f"{layer}post_attention_layernorm.weight", "channel", 3, "mlp_input", 1, 90),
        "embedding_row_x8": Edit(EMBEDDING, "row", 8, "embedding", None, 1500),
        "head_row_x20": Edit(HEAD, "row", 20, None, None, 700),
        "down_row_x4": Edit(f"{layer}mlp.down_proj.weight", "row", 4, "mlp_contribution", 2, 11),
        "output_row_x10": Edit(f"{layer}self_attn.o_proj.weight", "row", 10, "attention_contribution", 3, 50),
        "up_column_x10": Edit(f"{layer}mlp.up_proj.weight", "column", 10, "mlp_hidden", 0, 64),
        "query_head_x3": Edit(f"{layer}self_attn.q_proj.weight", "head", 3, "query_pre_rope", 1, 0),
        "scalar_gain_x4": Edit(f"{layer}input_layernorm.weight", "all", 4, "attention_input", 3),
        "down_matrix_x3": Edit(f"{layer}mlp.down_proj.weight", "all", 3, "mlp_contribution", 2),
        "projection_row_x10": Edit("model.embedding_projection.weight", "row", 10, "embedding", None, 5),
    }
    for name, edit in edits.items():
        recipe: Recipe = "muon_embproj" if edit.axis == "channel" else "osp"
        yield Fault(name, "mid_run", (_edited(edit),), recipe=recipe)
    yield from (
        Fault("learning_rate_x3_silent", "mid_run", (_rate(3),), silent=Planting(plant.multiply_rates(3))),
        Fault("learning_rate_tenth_silent", "mid_run", (_rate(0.1),),
              silent=Planting(plant.multiply_rates(0.1))),
        Fault("adam_on_hidden_silent", "mid_run", (ADAM_ON_HIDDEN,),
              silent=Planting(code=plant.reroute(HIDDEN, "adamw")), new_segment=True),
        Fault("adam_on_projections_silent", "mid_run", (ADAM_ON_PROJECTIONS,),
              silent=Planting(code=plant.reroute(PROJECTIONS, "adamw")), new_segment=True),
        Fault("decay_x30", "mid_run", (MORE_DECAY,),
              times={"optimizer.weight_decay": 30}),
        Fault("decay_x30_silent", "mid_run", (MORE_DECAY,),
              silent=Planting(plant.set_decay(0.3))),
        Fault("rotary_base_1000", "mid_run", (_rotary(1000),),
              silent=Planting(code=plant.rotary_base(1000))),
        Fault("rotary_base_100_declared", "mid_run", (_rotary(100),), changes={"model.rope_theta": 100.0}),
        Fault("late_labels", "mid_run", (_data("labels one position late", "label"),),
              silent=Planting(batch=plant.late_labels)),
        Fault("shuffled_labels", "mid_run", (_data("labels in another order", "label"),),
              silent=Planting(batch=plant.shuffled_labels)),
        Fault("spike_clipped", "mid_run", (SPIKE,), silent=Planting(batch=plant.spike)),
        Fault("no_clipping", "mid_run", (NO_CLIPPING,), changes=WITHOUT_CLIPPING),
        Fault("gains_without_projections", "mid_run", (GAINS, NO_PROJECTIONS),
              changes=TO_GAINS | TO_NO_PROJECTIONS),
        Fault("adam_on_projections_learning_rate_x3", "mid_run", (ADAM_ON_PROJECTIONS, _rate(3)),
              changes=TO_ADAM_ON_PROJECTIONS, times={"optimizer.lr": 3}),
        Fault("gains_from_start", "start", (GAINS,), changes=TO_GAINS),
        Fault("no_projections_from_start", "start", (NO_PROJECTIONS,), changes=TO_NO_PROJECTIONS),
        Fault("projections_not_orthogonal_from_start", "start",
              (Cause("projections", "projections not orthogonal", ("orthogonal",), (PROJECTIONS,)),),
              silent=Planting(plant.projections_without_orthogonality)),
        Fault("adam_on_projections_from_start", "start", (ADAM_ON_PROJECTIONS,),
              changes=TO_ADAM_ON_PROJECTIONS),
        Fault("adam_on_projections_silent_from_start", "start", (ADAM_ON_PROJECTIONS,),
              silent=Planting(code=plant.reroute(PROJECTIONS, "adamw"))),
        Fault("muon_on_embedding_from_start", "start", (MUON_ON_EMBEDDING,), changes=TO_MUON_ON_EMBEDDING),
        Fault("tied_head_from_start", "start",
              (Cause("optimizer_routing", "head tied to the embedding", ("tie|tying",), (EMBEDDING, HEAD)),),
              changes={"model.tie_embeddings": True}),
        Fault("no_warmup_from_start", "start",
              (Cause("learning_rate", "no warm-up", ("warm",)),), changes={"schedule.warmup": 0}),
        Fault("no_decay_from_start", "start", (NO_DECAY,), changes=WITHOUT_DECAY),
        Fault("learning_rate_x30_from_start", "start", (_rate(30),), times={"optimizer.lr": 30}),
    )  # fmt: skip


def _healthy() -> Iterable[Fault]:
    """Trainings without a fault; one is resumed at the onset, and one goes on as a new segment there."""
    yield Fault("healthy_osp", "healthy", (), False)
    yield Fault("healthy_osp_resumed", "healthy", (), False)
    yield Fault("healthy_osp_segment", "healthy", (), False, new_segment=True)
    yield Fault("healthy_gains", "healthy", (), recipe="muon_embproj")
    yield Fault("healthy_adam", "healthy", (), True, recipe="adam")


FAULTS: Mapping[str, Fault] = {
    fault.name: fault
    for fault in (
        *_development(),
        *(replace(fault, is_development=False) for fault in _held_out()),
        *_healthy(),
    )
}
"""All of them by name."""
