"""The table of planted faults is whole, each plants what it says, and answers are scored rightly."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from benchmarks.planted_faults import planting
from benchmarks.planted_faults.answers import Finding
from benchmarks.planted_faults.faults import FAULTS
from benchmarks.planted_faults.page import confusion, page
from benchmarks.planted_faults.scoring import score
from benchmarks.planted_faults.training import BASES, PRESETS, Job, Setting
from osp_diag.analyses.diagnosis.findings import FAMILIES
from osp_diag.schema import SITES
from osp_diag.trainer.config_values import differences
from osp_diag.trainer.data import Batch
from osp_diag.trainer.model import Llama
from osp_diag.trainer.optimizers.routing import named_parameters, route

SETTING = Setting(Path("planted"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_what_its_row_says(name: str) -> None:
    """Families, sites, parameters, configuration and words are those of the house."""
    fault, job = FAULTS[name], Job(name, 0, SETTING)
    assert {cause.family for cause in fault.causes} <= set(FAMILIES)
    assert (fault.begins == "healthy") == (not fault.causes)
    lines = differences(job.healthy_config(), job.config())
    # A table is compared entry by entry, and changed as a whole.
    changed = {re.sub(r"^(optimizer\.route)\..*", r"\1", line.partition(":")[0]) for line in lines}
    assert changed == set(fault.changes) | set(fault.times)
    names = {name for job in (job, job.base) for name in _parameters(job)}
    for cause in fault.causes:
        assert all(any(fnmatchcase(name, pattern) for name in names) for pattern in cause.parameters)
        assert all(re.search(word, cause.text.lower()) for word in cause.words), "its own text names it"
        assert cause.edit is None or cause.edit.site is None or cause.edit.site in SITES


def _parameters(job: Job) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return named_parameters(Llama(job.config().model))


@pytest.mark.parametrize("preset", PRESETS)
def test_edits_are_within_their_parameters(preset: str) -> None:
    edits = [(f, cause.edit) for f in FAULTS.values() for cause in f.causes if cause.edit is not None]
    for fault, edit in edits:
        config = Setting(Path("planted"), preset).config(fault.recipe, 0)
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in named_parameters(Llama(config.model)).items()}
        for seed in range(4):
            spot = edit.spot(config, seed)
            axis = {"row": 0, "channel": 0, "column": 1, "head": 0, "all": 0}[edit.axis]
            width = config.model.head_size if edit.axis == "head" else 1
            assert (spot.index + 1) * width <= shapes[spot.parameter][axis]


@pytest.mark.parametrize(
    ("name", "pattern", "owner"),
    [
        ("adam_on_hidden", "model.layers.*_proj.weight", "adamw"),
        ("adam_on_projections", "*embedding_projection.weight", "adamw"),
        ("muon_on_embedding", "model.embed_tokens.weight", "muon"),
        ("muon_on_embedding", "lm_head.weight", "muon"),
    ],
)
def test_a_routing_fault_moves_its_parameters_and_no_others(name: str, pattern: str, owner: str) -> None:
    job = Job(name, 0, SETTING)
    with torch.device("meta"):
        model = Llama(job.config().model)
    before, after = (route(model, config) for config in (job.healthy_config(), job.config()))
    moved = {
        new.name: new.optimizer
        for old, new in zip(before.routes, after.routes, strict=True)
        if old.optimizer != new.optimizer
    }
    causes = FAULTS[name].causes[0].parameters
    assert all(any(fnmatchcase(parameter, part) for part in causes) for parameter in moved)
    assert {moved[parameter] for parameter in moved if fnmatchcase(parameter, pattern)} == {owner}


def test_batches_change_when_they_should() -> None:
    ids = torch.arange(24).reshape(2, 12)
    batch, other = Batch(ids, ids + 1), Batch(ids + 3, ids + 4)
    assert planting.repeated_document(other, batch, 1, 64).input_ids.tolist() == ids[:1].repeat(2, 1).tolist()
    assert planting.late_labels(batch, batch, 0, 64).labels[0, :3].tolist() == [2, 3, 4]
    assert planting.one_token(batch, batch, 0, 64).input_ids.unique().tolist() == [0]
    assert planting.one_token(other, batch, 1, 64) is other
    assert planting.spike(other, batch, 1, 64) is other
    assert planting.spike(batch, batch, 0, 64).labels.unique().tolist() == [63]
    assert sorted(planting.shuffled_labels(batch, batch, 0, 64).labels[1].tolist()) == list(range(13, 25))
    assert planting.random_tokens(batch, batch, 0, 64).input_ids.shape == ids.shape


def test_every_recipe_has_its_base() -> None:
    assert {fault.recipe for fault in FAULTS.values()} == set(BASES)
    assert all(FAULTS[name].recipe == recipe and not FAULTS[name].causes for recipe, name in BASES.items())


HEALTHY = {50: 0.12, 60: 0.15, 100: 0.14}
LOSSES = {50: 6.2, 60: 6.1, 100: 6.0}


def scored(name: str, *findings: Finding, seed: int = 0, alerts: dict[int, list[str]] | None = None) -> dict:
    kurtosis = {50: 0.12, 60: 0.4, 100: 0.2}
    return score(Job(name, seed, SETTING), alerts or {}, findings, kurtosis, HEALTHY, LOSSES, ["projections"])


def test_an_edit_is_found_by_parameter_or_by_site() -> None:
    parameter = "model.layers.1.mlp.down_proj.weight"
    exact = Finding(
        "weight_edit", "row 77 of down_proj grew", "proved", 50, 51, parameters=(parameter,), indices=(77,)
    )
    result = scored("down_row_x10", exact, alerts={60: ["changed"]})
    assert result["group"] == "development"
    assert result["noticed_after"] == 10
    assert result["raised"]
    assert result["bracket_right"]
    assert [result[f"{key}_right"] for key in ("family", "place", "index", "cause")] == [True] * 4
    nearby = Finding(
        "weight_edit", "something grew", "measured", 40, 50, site="mlp_contribution", layer=1, indices=(76,)
    )
    result = scored("down_row_x10", nearby)
    assert [result[f"{key}_right"] for key in ("family", "place", "index", "cause")] == [
        True,
        True,
        False,
        False,
    ]
    assert not result["bracket_right"], "step 50 was healthy"
    elsewhere = scored("down_row_x10", exact, seed=1)
    assert elsewhere["group"] == "held out: seeds"
    assert elsewhere["family_right"]
    assert not elsewhere["place_right"]


@pytest.mark.parametrize(
    ("end", "heals"),
    [((100, 0.16, 6.2), True), ((100, 0.4, 6.0), False), ((100, 0.14, 6.4), False), (None, None)],
)
def test_a_remedy_heals_that_leads_back_to_the_healthy_training(
    end: tuple[int, float, float] | None, heals: bool | None
) -> None:
    result = scored("no_projections_from_start", Finding("projections", "no projections", remedied=end))
    assert result["remedy_heals"] is heals
    assert result["experiments_right"]
    assert not scored("down_row_x10", Finding("data", "data", remedied=end))["experiments_right"]


def test_only_as_many_families_count_as_there_are_causes() -> None:
    wrong, right = Finding("data", "other data"), Finding("precision", "weights rounded to bfloat16")
    result = scored("bfloat16_weights", wrong, right)
    assert not result["family_right"]
    assert result["wrong_families"] == ["data"]
    assert result["place_right"] is None
    both = [Finding("clipping", "clipping is off"), Finding("batch", "batch 51 is a spike")]
    assert scored("spike_unclipped", *both)["family_right"]
    half = scored("spike_unclipped", both[0])
    assert not half["family_right"]
    assert (half["causes_named"], half["causes"]) == (1, 2)


def test_a_healthy_training_has_only_false_alarms() -> None:
    result = scored("healthy_osp", Finding("data", "other data"), alerts={60: ["changed"]})
    assert result["false_alerts"] == 1
    assert result["wrong_families"] == ["data"]
    assert scored("healthy_adam", alerts={60: ["growing_kurtosis"]})["false_alerts"] == 0
    assert not scored("healthy_gains", Finding("norm_gain", "a gain per channel"))["wrong_families"]


def test_the_page_counts_groups_families_and_faults() -> None:
    down = Finding("weight_edit", "row of down_proj", site="mlp_contribution", layer=1, indices=(77,))
    scores = [scored("down_row_x10", down), scored("no_decay"), scored("healthy_osp"), scored("healthy_adam")]
    assert confusion(scores)["weight_edit"] == {"weight_edit": 1}
    assert confusion(scores)["healthy"] == {"nothing": 2}
    text = page(scores)
    assert "2 trainings with a fault and 2 without" in text
    assert (
        "| development | raised | 2 | 0/2 | – | 1/2 | 1/2 | 0/2 | 1/1 | 1/1 | 1/2 | – | – | 0/2 | 0/2 |"
        in text
    )
