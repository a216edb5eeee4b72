"""Labels are declared once: a further step is plain arrays, and means what a labelled one would."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import osp_diag
from osp_diag.errors import StoreError
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Suite
from osp_diag.probing import labelling
from osp_diag.probing.host import to_host
from osp_diag.probing.labelling import StepLabels, labelled_groups
from osp_diag.runs.axis import GrowingArray
from osp_diag.runs.declared import DeclaredGroup, GroupStep, ProbedStep
from osp_diag.runs.format import ArrayLayout, compact
from osp_diag.runs.writer import RunWriter
from tests.run_fixtures import ATTRIBUTES, check_run, groups, site
from tests.tiny_checkpoints import llama

IDS = torch.arange(16)[None]
SITES = ["residual_*", "attention", "query_post_rope", "mlp_down_weight"]
"""Of every kind: activations, heads, attention and weights."""

Observed = tuple[dict[Any, Any], dict[Any, Any], dict[str, Mapping[str, Suite]]]


def observed(probe: osp_diag.Probe, step: int) -> Observed:
    """States, layouts and estimators of one forward pass."""
    with probe.collect() as collector, torch.no_grad():
        probe.model((IDS + step) % 64)
    states = to_host(collector.states)
    return states, dict(collector.layouts), {key[0]: collector.suites_at(key[0]) for key in states}


def labelled(measured: Observed, labels: StepLabels) -> ProbedStep:
    states, layouts, suites = measured
    return labelled_groups(suites.__getitem__, states, layouts, keep_raw=True, labels=labels)


def assert_same_steps(step: Mapping[str, xr.Dataset], other: Mapping[str, xr.Dataset]) -> None:
    assert list(step) == list(other)
    for group, dataset in other.items():
        xr.testing.assert_identical(step[group], dataset)
        assert [str(name) for name in step[group].variables] == [str(name) for name in dataset.variables]


@pytest.fixture(scope="module")
def probe() -> osp_diag.Probe:
    return osp_diag.Probe(llama(), sites=SITES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


class TestLabelling:
    def test_a_further_step_is_what_it_would_be_if_it_were_the_first(self, probe: osp_diag.Probe) -> None:
        labels = StepLabels()
        for step in range(3):
            measured = observed(probe, step)
            again = labelled(measured, labels)
            assert all(isinstance(part, GroupStep) for part in again.groups.values())
            assert_same_steps(again, labelled(measured, StepLabels()))

    def test_layers_of_other_widths_are_joined_at_every_step(self, probe: osp_diag.Probe) -> None:
        """As in models whose width or number of heads changes on the way."""
        config = transformers.LlamaConfig(
            **llama().config.to_dict() | {"hidden_size": 24, "num_attention_heads": 3}
        )
        wide = osp_diag.Probe(transformers.LlamaForCausalLM(config), sites=SITES)
        labels = StepLabels()
        for step in range(2):
            states, layouts, suites = observed(probe, step)
            more, other, _ = observed(wide, step)
            states |= {(site, layer + 7, kind): state for (site, layer, kind), state in more.items()}
            layouts |= {(site, layer + 7, kind): layout for (site, layer, kind), layout in other.items()}
            again = labelled((states, layouts, suites), labels)
            assert np.isnan(again["residual_post"]["channel_rms"].sel(layer=0)).any()
            assert_same_steps(again, labelled((states, layouts, suites), StepLabels()))

    def test_labels_follow_a_structure_that_changes(self, probe: osp_diag.Probe) -> None:
        labels = StepLabels()
        first = labelled(observed(probe, 0), labels)
        states, layouts, suites = observed(probe, 1)
        fewer = {key: state for key, state in states.items() if key[:2] != ("residual_post", 0)}
        second = labelled((fewer, layouts, suites), labels)
        assert second["residual_post"]["layer"].values.tolist() == [0, 1]
        assert labelled((fewer, layouts, suites), StepLabels())["residual_post"]["layer"].values == [1]
        for name, variable in second["residual_post"].data_vars.items():
            assert np.isnan(variable.sel(layer=0)).all(), name
        for group in ("residual_post", "raw/residual_post", "residual_mid"):
            same, other = (step.groups[group] for step in (first, second))
            assert isinstance(same, GroupStep)
            assert isinstance(other, GroupStep)
            assert same.declared is other.declared

    def test_coordinates_that_follow_from_the_numbers_are_looked_at(self) -> None:
        suite, labels = Suite([Drifting()]), StepLabels()

        def step(total: float) -> xr.Dataset:
            states = {("x", 0, "activation"): {"total.sum": np.asarray(total)}}
            layouts = {("x", 0, "activation"): Layout()}
            return labelled((states, layouts, {"x": {"activation": suite}}), labels)["x"]

        for total in (1.0, 1.0, 2.0, 1.0):
            assert step(total)["edge"].values.tolist() == [total, total + 1]

    def test_datasets_are_made_for_whoever_looks(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        built: list[int] = []
        dataset = DeclaredGroup.dataset
        monkeypatch.setattr(
            DeclaredGroup, "dataset", lambda *arguments: (built.append(1), dataset(*arguments))[1]
        )
        with osp_diag.Probe(llama(), out=path, sites=["residual_*", "attention"]) as probe:
            with probe.step(0):
                probe.model(IDS)
            built.clear()
            monkeypatch.setattr(labelling, "label_states", None)
            monkeypatch.setattr(labelling, "raw_states", None)
            for step in (1, 2):
                with probe.step(step):
                    probe.model(IDS + step)
            assert not built
            latest = probe.latest
            assert "residual_post" in latest
            assert "series" not in latest
            assert latest["residual_post"] is latest["residual_post"]
            assert len(built) == 1
            stored = probe.run.at("residual_post").isel(step=-1, drop=True)
            xr.testing.assert_identical(stored.load(), latest["residual_post"])


@dataclass(frozen=True)
class Total(Measurement):
    name: str = "total"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"sum": Field(())}

    def measure(self, observation: Any) -> Mapping[str, Any]:
        raise AssertionError(observation)


class Drifting(Estimator):
    """A number whose coordinate depends on the data."""

    name = "drifting"
    title = "drifting"
    formula = "x"
    range = "any"
    sources = ()
    measurements = (Total(),)

    def finalise(self, state: Mapping[str, Any], layout: Layout) -> dict[str, Output]:
        total = state["total.sum"]
        return {
            "drifting": Output(
                np.stack([total, total], -1), ("edge",), coords={"edge": [total[0], total[0] + 1]}
            )
        }


def declared_steps(*steps: int) -> list[ProbedStep]:
    """What :func:`groups` gives, with the labels of the first."""
    declared = {name: DeclaredGroup.of(dataset) for name, dataset in groups(steps[0]).items()}
    return [
        ProbedStep(
            {
                name: GroupStep(
                    declared[name], {str(key): own.values for key, own in dataset.data_vars.items()}
                )
                for name, dataset in groups(step).items()
            }
        )
        for step in steps
    ]


class TestWriting:
    @pytest.mark.parametrize("block", [1, 3])
    def test_a_run_of_plain_arrays_is_a_run_of_datasets(self, path: Path, tmp_path: Path, block: int) -> None:
        with RunWriter(path, ATTRIBUTES, block=block) as writer:
            for step, recorded in enumerate(declared_steps(0, 1, 2, 3)):
                writer.append(step, recorded)
        with RunWriter(path, ATTRIBUTES, resume=True) as writer:
            for step, recorded in zip((4, 5), declared_steps(4, 5), strict=True):
                writer.append(step, recorded)
        assert check_run(path) == [0, 1, 2, 3, 4, 5]
        with RunWriter(tmp_path / "datasets.zarr", ATTRIBUTES) as writer:
            for step in range(6):
                writer.append(step, groups(step))
        files = sorted(file.relative_to(path) for file in path.rglob("c.*"))
        assert [(path / file).read_bytes() for file in files] == [
            (tmp_path / "datasets.zarr" / file).read_bytes() for file in files
        ]

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (np.zeros((2, 4), np.float32), r"absolute_maximum has shape \(2, 4\), before \(3, 4\)"),
            (np.zeros((3, 4)), "absolute_maximum has type float64, before float32"),
            (None, "residual_post/absolute_maximum is missing"),
        ],
    )
    def test_arrays_that_do_not_fit_are_refused_and_nothing_is_lost(
        self, path: Path, wrong: np.ndarray | None, message: str
    ) -> None:
        first, bad, second = declared_steps(0, 1, 1)
        part = bad.groups["residual_post"]
        assert isinstance(part, GroupStep)
        arrays = {name: values for name, values in part.arrays.items() if name != "absolute_maximum"}
        if wrong is not None:
            arrays["absolute_maximum"] = wrong
        spoilt = ProbedStep(dict(bad.groups) | {"residual_post": replace(part, arrays=arrays)})
        with RunWriter(path, ATTRIBUTES) as writer:
            writer.append(0, first)
            with pytest.raises(StoreError, match=message):
                writer.append(1, spoilt)
            more = replace(part, arrays=dict(part.arrays) | {"more": np.zeros(3)})
            with pytest.raises(StoreError, match="residual_post/more is new"):
                writer.append(1, ProbedStep(dict(bad.groups) | {"residual_post": more}))
            writer.append(1, second)
        assert check_run(path) == [0, 1]

    def test_other_labels_are_compared_in_full(self, path: Path) -> None:
        (first,) = declared_steps(0)
        moved = site(1).assign_coords(layer=[0, 1, 7])
        arrays = {str(key): own.values for key, own in moved.data_vars.items()}
        other = first | ProbedStep({"residual_post": GroupStep(DeclaredGroup.of(moved), arrays)})
        with RunWriter(path, ATTRIBUTES) as writer:
            writer.append(0, first)
            with pytest.raises(StoreError, match=r"coordinate residual_post/layer is \[0, 1, 7\]"):
                writer.append(1, other)
            with pytest.raises(StoreError, match=r"coordinate residual_post/layer is \[0, 1, 7\]"):
                writer.append(1, other)

    def test_rows_are_copied(self, path: Path) -> None:
        first, second = declared_steps(0, 1)
        with RunWriter(path, ATTRIBUTES, block=9) as writer:
            writer.append(0, first)
            writer.append(1, second)
            for part in second.groups.values():
                assert isinstance(part, GroupStep)
                for values in part.arrays.values():
                    values[:] = 99
        assert check_run(path) == [0, 1]


class TestCommittedMetadata:
    @given(length=st.integers(0, 10**9), row=st.lists(st.integers(1, 99), max_size=3))
    def test_the_text_of_an_array_is_its_metadata(self, length: int, row: list[int]) -> None:
        dims = ("step", *(f"d{index}" for index in range(len(row))))
        layout = ArrayLayout(dims, "float32", (4, *row), {"definition": 'a "shape goes here", [0]'})
        assert GrowingArray(layout).metadata(length) == compact(layout.metadata((length, *row)))

    def test_no_byte_of_the_commit_pointer_is_a_space_between_words_of_json(self, path: Path) -> None:
        with RunWriter(path, ATTRIBUTES) as writer:
            writer.append(0, groups(0))
        text = (path / "zarr.json").read_text()
        assert text == json.dumps(json.loads(text), separators=(",", ":"))
