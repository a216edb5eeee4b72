"""Which parameter goes to which optimizer, the table of it, refusals and warnings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from osp_diag.errors import TrainingError, UsageError
from osp_diag.trainer.config import TrainConfig
from osp_diag.trainer.config_values import with_changes
from osp_diag.trainer.model import Llama
from osp_diag.trainer.optimizers import Routing, route

SMALL = {
    "model.vocabulary_size": 40,
    "model.hidden_size": 16,
    "model.intermediate_size": 24,
    "model.layers": 2,
    "model.heads": 2,
}


def configured(**changes) -> TrainConfig:
    return with_changes(
        TrainConfig(), SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    )


def routed(**changes) -> Routing:
    config = configured(**changes)
    return route(Llama(config.model), config)


def by_optimizer(routing: Routing) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for entry in routing.routes:
        found.setdefault(entry.optimizer, set()).add(entry.name)
    return found


OUTER = {"model.embed_tokens.weight", "lm_head.weight"}
PROJECTIONS = {"model.embedding_projection.weight", "unembedding_projection.weight"}


def test_osp_decouples_embedding_and_head():
    routing = routed(optimizer__lr="0.01", optimizer__embedding_lr="0.1")
    found = by_optimizer(routing)
    assert {name for name in found["adamw"] if "norm" not in name} == OUTER
    assert found["muon"] >= PROJECTIONS
    assert len(found["muon"]) == 2 * 7 + 2
    assert routing.warnings == ()
    assert {entry.lr for entry in routing.routes if entry.optimizer == "adamw"} == {0.1}
    assert {entry.lr for entry in routing.routes if entry.optimizer == "muon"} == {0.01}
    for entry in routing.routes:
        assert entry.weight_decay == (0 if entry.role == "vector" else 0.01)


def test_vectors_go_to_muon_in_osps_own_form():
    assert by_optimizer(routed(optimizer__muon_form="osp"))["adamw"] == OUTER


def test_adamw_takes_all_at_one_rate():
    routing = routed(
        optimizer__name="adamw",
        optimizer__embedding_lr="0.5",
        model__norm="rmsnorm",
        model__embedding_projection=False,
    )
    assert set(by_optimizer(routing)) == {"adamw"}
    assert {entry.lr for entry in routing.routes} == {2e-3}
    assert routing.warnings == ()


def test_muon_only_has_no_adam():
    assert set(by_optimizer(routed(optimizer__name="muon_only"))) == {"muon"}


@pytest.mark.parametrize("name", ["soap", "shampoo"])
def test_second_order_stands_in_muons_place(name):
    routing = routed(optimizer__name=name)
    assert by_optimizer(routing)[name] == by_optimizer(routed())["muon"]
    assert f"{name} stands in Muon's place: a comparison, not OSP" in routing.warnings


def test_a_tied_head_is_the_embedding():
    routing = routed(model__tie_embeddings=True)
    assert "lm_head.weight" not in {entry.name for entry in routing.routes}
    assert routing.of("model.embed_tokens.weight").optimizer == "adamw"
    assert any("one matrix under AdamW" in warning for warning in routing.warnings)
    with pytest.raises(KeyError):
        routing.of("lm_head.weight")


def test_the_table_folds_layers():
    lines = routed().table().splitlines()
    assert lines[0].split() == ["parameter", "shape", "count", "optimizer", "lr", "weight", "decay"]
    [line] = [line for line in lines if "gate_proj" in line]
    assert line.split() == [
        "model.layers.*.mlp.gate_proj.weight",
        "24",
        "×",
        "16",
        "×2",
        "muon",
        "0.002",
        "0.01",
    ]
    columns = [line.index("muon") if "muon" in line else line.index("adamw") for line in lines[1:]]
    assert set(columns) == {lines[0].index("optimizer")}


def test_frozen_parameters_are_shown_and_left_alone():
    config = configured()
    model = Llama(config.model)
    model.model.embed_tokens.weight.requires_grad_(False)
    routing = route(model, config)
    assert routing.frozen == ("model.embed_tokens.weight",)
    assert "frozen" in routing.table()


def test_wrappers_add_nothing_to_names():
    config = configured()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.ModuleDict({"_orig_mod": Llama(config.model)})

    assert route(Wrapped(), config) == route(Llama(config.model), config)


# Routes of one's own


def test_a_route_by_pattern_overrides():
    routing = routed(optimizer__route="*norm.weight:muon")
    norms = {entry.name for entry in routing.routes if entry.name.endswith("norm.weight")}
    assert len(norms) == 5
    assert norms <= by_optimizer(routing)["muon"]


def test_the_first_pattern_that_matches_counts():
    routing = routed(optimizer__name="adamw", optimizer__route="*.0.*q_proj*:adamw,*q_proj*:muon")
    assert by_optimizer(routing)["muon"] == {"model.layers.1.self_attn.q_proj.weight"}
    assert any("optimizer.name=adamw, but optimizer.route sends" in text for text in routing.warnings)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(
        UsageError, match=r"no parameter is named like 'embedding'; .* model.embed_tokens.weight"
    ):
        routed(optimizer__route="embedding:muon")


def test_an_unknown_optimizer_in_a_route_is_refused():
    with pytest.raises(UsageError, match=r"optimizer.route=.*one of adamw, muon, soap, shampoo"):
        routed(optimizer__route="*:sgd")


# Misrouted


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "model.embed_tokens.weight:muon",
            r"misrouted: model.embed_tokens.weight under muon in an OSP recipe",
        ),
        ("lm_head.weight:muon", r"lm_head.weight under muon .* for Muon on all say optimizer.name=muon_only"),
        (
            "*projection*:adamw",
            r"unembedding_projection.weight under adamw .* trains the projections by Muon",
        ),
        (
            "*mlp*:adamw",
            r"misrouted: model.layers.0.mlp.gate_proj.weight, .* and 2 more under adamw .* hidden matrices",
        ),
        ("*q_proj*:soap", r"q_proj.weight under soap"),
    ],
)
def test_misrouted_osp_runs_are_refused_by_name(entry, message):
    with pytest.raises(TrainingError, match=message):
        routed(optimizer__route=entry)


@pytest.mark.parametrize("change", [{"model__norm": "rmsnorm"}, {"optimizer__name": "muon_only"}])
def test_other_recipes_may_route_as_they_like_and_are_told(change):
    name = "adamw" if "optimizer__name" in change else "muon"
    routing = routed(optimizer__route=f"model.embed_tokens.weight:{name}", **change)
    assert any("model.embed_tokens.weight" in warning for warning in routing.warnings)


def test_gains_per_channel_left_in_are_refused():
    built = Llama(configured(model__norm="rmsnorm").model)
    with pytest.raises(
        TrainingError, match=r"per channel are left in .* model.layers.0.input_layernorm.weight"
    ):
        route(built, configured())


def test_a_model_with_other_projections_than_configured_is_refused():
    with_projections, without = configured(), configured(model__embedding_projection=False)
    with pytest.raises(TrainingError, match=r"is on, but the model has no trainable embedding_projection"):
        route(Llama(without.model), with_projections)
    with pytest.raises(TrainingError, match=r"is off, but the model has model.embedding_projection.weight"):
        route(Llama(with_projections.model), without)


def test_vectors_under_second_order_are_refused():
    with pytest.raises(
        TrainingError, match=r"sends vectors to soap, which preconditions matrices: model.norm"
    ):
        routed(optimizer__route="model.norm.weight:soap")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__norm": "rmsnorm"}, "5 norms have a gain per channel"),
        ({"model__embedding_projection": False}, "no embedding projections"),
        ({"model__norm": "srmsnorm"}, "srmsnorm has no gain"),
        ({"model__query_key_norm": True}, "norms of queries and keys"),
        ({"optimizer__name": "adamw"}, "AdamW moves all, with parts of OSP"),
    ],
)
def test_what_is_no_osp_is_flagged(changes, words):
    [warning] = routed(**changes).warnings
    assert words in warning


def test_routing_needs_no_memory_for_weights():
    config = configured()
    with torch.device("meta"):
        model = Llama(config.model)
    assert route(model, config) == routed()
