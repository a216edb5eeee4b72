"""A diagnosis names what was planted, where it sits and since when, and nothing in a healthy training."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import osp_diag
from benchmarks.planted_faults import planting as plant
from benchmarks.planted_faults.planting import Edit, Planting
from osp_diag.analyses import diagnose
from osp_diag.analyses.diagnosis.findings import CONFIDENCES, FAMILIES, Bracket, Diagnosis, Finding
from osp_diag.cli.main import main
from osp_diag.runs.run import Run, open_run
from osp_diag.trainer.checkpoint import folder_of
from osp_diag.trainer.config import TrainConfig
from osp_diag.trainer.laboratory import laboratory, weight_changes
from osp_diag.trainer.laboratory.replaying import fits
from osp_diag.trainer.loop import train
from osp_diag.trainer.model import Llama
from tests.growing_runs import ATTRIBUTES, groups
from tests.training_runs import minute

ONSET, STEPS = 8, 12
HEALTHY = Planting()


def config(**changes: Any) -> TrainConfig:
    """A healthy training, fewer sites than elsewhere."""
    base = {"steps": STEPS, "probe__every": 4, "checkpoint__every": 4, "checkpoint__keep": 9}
    sites = ("embedding", "residual_post", "final_norm")
    return minute(**base | {"probe__sites": sites} | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The healthy training up to the onset."""
    out = tmp_path_factory.mktemp("base") / "run.zarr"
    train(config(), out, until=ONSET)
    return out


@pytest.fixture(scope="module")
def healthy(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gone_on(base, tmp_path_factory.mktemp("healthy"))


def gone_on(base: Path, folder: Path, planting: Planting = HEALTHY, **changes: Any) -> Path:
    """A copy of the base that went on with a fault; with changes, as a new segment."""
    out = folder / "run.zarr"
    shutil.copytree(base, out)
    shutil.copytree(folder_of(base), folder_of(out))
    options = {"start": out, "segment": True} if changes else {"resume": True}
    with planting.planted():
        train(config(**changes), out, **options)
    return out


def diagnosed(path: Path, against: Path | None = None, **options: Any) -> Diagnosis:
    run = open_run(path)
    good = None if against is None else open_run(against)
    return diagnose(run, laboratory(run), against=good, its_laboratory=good and laboratory(good), **options)


def families(diagnosis: Diagnosis) -> set[str]:
    return {finding.family for finding in diagnosis.findings}


def the(diagnosis: Diagnosis, family: str) -> Finding:
    findings = [finding for finding in diagnosis.findings if finding.family == family]
    assert len(findings) == 1, str(diagnosis)
    return findings[0]


def test_nothing_is_named_in_a_healthy_run(healthy: Path) -> None:
    run = open_run(healthy)
    diagnosis = run.diagnose()
    assert diagnosis.findings == ()
    assert "No cause is named" in str(diagnosis)
    assert "Nothing got worse: kurtosis and held-out loss did not rise." in str(diagnosis)
    assert "the weights are not rounded to bfloat16" in diagnosis.ruled_out
    assert diagnosis.not_recorded == ()


@pytest.mark.parametrize(
    ("kurtosis", "losses", "sentence", "bracket"),
    [
        ([20, 20, np.nan], [3, 3, 3], "kurtosis is nan", Bracket(10, 20)),
        ([20, 20, 20], [3, np.nan, 3], "held-out loss is nan", Bracket(0, 10)),
        ([20, 20, 20], [3, 3, np.nan], "held-out loss is nan", Bracket(10, 20)),
    ],
)
def test_what_becomes_nan_got_worse(
    kurtosis: list[float], losses: list[float], sentence: str, bracket: Bracket
) -> None:
    probed = [(10 * step, groups([over, 20])) for step, over in enumerate(kurtosis)]
    columns = {
        "held_out_loss": losses,
        "probe_seconds": [1.0] * 3,
        "loss": [3.0] * 3,
        "step_seconds": [1.0] * 3,
    }
    series = {name: {10 * step: value for step, value in enumerate(of)} for name, of in columns.items()}
    series["loss"][25] = 3.0
    diagnosis = diagnose(Run.in_memory(probed, {}, ATTRIBUTES, series))
    assert diagnosis.regression == (f"{sentence} ({bracket})",)
    assert diagnosis.bracket == bracket


def test_a_learning_rate_in_the_optimizers_alone(base: Path, tmp_path: Path) -> None:
    finding = the(diagnosed(gone_on(base, tmp_path, Planting(plant.multiply_rates(10)))), "learning_rate")
    assert finding.cause == "learning rate × 10 in all groups of the optimizers"
    assert (finding.confidence, finding.bracket) == ("proved", Bracket(ONSET, ONSET + 1))


def test_an_edited_row_is_placed_and_undone(base: Path, tmp_path: Path) -> None:
    edit = Edit("model.layers.{layer}.mlp.down_proj.weight", "row", 10, None, 1, 7)
    diagnosis = diagnosed(gone_on(base, tmp_path, Planting(edit.begin(config(), 0))))
    finding = the(diagnosis, "weight_edit")
    assert finding.cause.startswith("row 7 of down_proj of layer 1 × about 9")
    assert finding.place.parameter == ("model.layers.1.mlp.down_proj.weight",)
    assert (finding.place.layer, finding.place.row, finding.place.head) == (1, 7, None)
    assert finding.bracket == Bracket(ONSET, ONSET + 1)
    undone = f"with row 7 of model.layers.1.mlp.down_proj.weight as at step {ONSET}, the checkpoint of step "
    assert any(text.startswith(undone) for text in finding.evidence)
    assert families(diagnosis) == {"weight_edit"}


def test_three_silent_faults_at_once_are_all_named(base: Path, tmp_path: Path) -> None:
    rope = plant.rotary_base(100)
    planting = Planting(plant.round_weights, batch=plant.late_labels, code=rope)
    diagnosis = diagnosed(gone_on(base, tmp_path, planting))
    data, precision, function = (the(diagnosis, family) for family in ("data", "precision", "function"))
    assert data.cause == f"data from step {ONSET + 1} on: labels are not the next tokens"
    assert data.bracket == Bracket(ONSET, ONSET + 1)
    assert precision.cause == "weights are rounded to bfloat16"
    assert function.cause == "base of the rotary frequencies (RoPE): 10000 → 100"
    assert precision.bracket == function.bracket == Bracket(ONSET, STEPS)
    assert all(finding.confidence == "proved" for finding in diagnosis.findings)


def test_parameters_that_another_optimizer_moves_silently(base: Path, tmp_path: Path) -> None:
    code = plant.reroute("model.layers.*_proj.weight", "adamw")
    diagnosis = diagnosed(gone_on(base, tmp_path, Planting(code=code), name="other"))
    finding = the(diagnosis, "optimizer_routing")
    assert finding.cause == "AdamW moves hidden matrices, not Muon"
    assert len(finding.place.parameter) == 14
    assert all("layers" in name for name in finding.place.parameter)


@pytest.fixture(scope="module")
def declared(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segment with another optimizer and learning rate, and no clipping."""
    changes = {"optimizer__name": "adamw", "optimizer__lr": 4e-2, "optimizer__gradient_clip": None}
    return gone_on(base, tmp_path_factory.mktemp("declared"), **changes)


class TestDeclared:
    def test_all_changes_are_listed_with_their_parameters(self, declared: Path) -> None:
        diagnosis = diagnosed(declared)
        causes = {finding.cause: finding for finding in diagnosis.findings}
        assert set(causes) == {
            "AdamW moves embedding projections, not Muon",
            "AdamW moves hidden matrices, not Muon",
            "learning rate × 10 (0.004 → 0.04)",
            "no clipping of gradients",
        }
        assert all(finding.bracket == Bracket(ONSET, ONSET + 1) for finding in causes.values())
        hidden = causes["AdamW moves hidden matrices, not Muon"]
        assert "model.layers.0.self_attn.q_proj.weight" in hidden.place.parameter
        assert 'the configuration says optimizer.name: "muon" → "adamw"' in hidden.evidence

    def test_remedies_are_tried_and_can_be_typed(
        self, declared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = contents(declared)
        diagnosis = diagnosed(declared, verify=2)
        assert contents(declared) == before
        for finding in diagnosis.findings:
            assert finding.remedy is not None
            assert f"at step {ONSET + 2} kurtosis" in finding.remedy.outcome
        remedy = diagnosis.findings[0].remedy
        assert remedy is not None
        words = shlex.split(remedy.command)
        assert words[:3] == ["osp-diag", "train", "--from"]
        monkeypatch.chdir(tmp_path)
        assert main(words[1:]) == 0
        mended = open_run(tmp_path / "run-mended.zarr")
        assert mended.attrs["config"]["optimizer.name"] == "muon"
        assert int(mended.steps[-1]) == STEPS

    def test_json(self, declared: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["diagnose", str(declared), "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert {finding["family"] for finding in printed["findings"]} <= printed["families"].keys()
        assert printed["confidences"].keys() == CONFIDENCES.keys()
        assert printed["families"] == dict(FAMILIES)
        assert printed["findings"][0]["bracket"] == [ONSET, ONSET + 1]


def contents(run: Path) -> dict[str, tuple[int, bytes]]:
    """When each file of a run and its checkpoints was written, and what is in it."""
    files = [path for folder in (run, folder_of(run)) for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_what_a_run_has_otherwise_than_a_good_one_from_the_start(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    with Planting(plant.projections_without_orthogonality).planted():
        train(config(model__tie_embeddings=True, schedule__warmup=0), out, until=4)
    diagnosis = diagnosed(out, against=base)
    causes = {finding.cause for finding in diagnosis.findings}
    assert causes == {
        "the head is tied to the embedding",
        "no warm-up",
        "projections are not orthogonal at the start",
    }
    assert all(finding.bracket == Bracket(None, 1) for finding in diagnosis.findings)


class TestNotRecorded:
    """What cannot be asked is said; nothing is written, and nothing raises."""

    def test_without_checkpoints(self, healthy: Path, tmp_path: Path) -> None:
        out = tmp_path / "run.zarr"
        shutil.copytree(healthy, out)
        diagnosis = diagnosed(out)
        assert diagnosis.findings == ()
        assert any("there is no checkpoint in" in text for text in diagnosis.not_recorded)
        assert "No cause is named" in str(diagnosis)
        assert not folder_of(out).exists()

    def test_a_damaged_checkpoint_is_named_and_left_out(self, healthy: Path, tmp_path: Path) -> None:
        out = tmp_path / "run.zarr"
        shutil.copytree(healthy, out)
        shutil.copytree(folder_of(healthy), folder_of(out))
        weights = next((folder_of(out) / "step-00000004").glob("*.distcp"))
        weights.write_bytes(weights.read_bytes()[:100])
        diagnosis = diagnosed(out)
        assert diagnosis.findings == ()
        assert any("step-00000004" in text for text in diagnosis.not_recorded)

    def test_a_run_with_a_gap(self, base: Path, tmp_path: Path) -> None:
        out = tmp_path / "run.zarr"
        shutil.copytree(base, out)
        shutil.copytree(folder_of(base), folder_of(out))
        train(config(log_every=4), out, resume=True)
        for checkpoint in ("step-00000004", "step-00000008"):
            shutil.rmtree(folder_of(out) / checkpoint)
        diagnosis = diagnosed(out)
        assert diagnosis.findings == ()
        assert "the weights are not rounded to bfloat16" not in diagnosis.ruled_out

    def test_of_another_loop(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "probed.zarr"
        torch.manual_seed(0)
        model = Llama(config().model)
        ids = torch.randint(0, 4096, (2, 32))
        with osp_diag.Probe(
            model, every=1, out=out, sites=["embedding", "residual_post", "final_norm"]
        ) as probe:
            for step in range(2):
                with probe.step(step):
                    model(ids)
        page = tmp_path / "diagnosis.html"
        assert main(["diagnose", str(out), "--out", str(page)]) == 0
        html = page.read_text()
        assert "this is no run of `osp-diag train`" in html
        assert "nothing that was looked at differs" in html.partition("<main>")[2]
        assert "plotly-graph-div" in html
        assert "first_jumps: the run of" in html.partition("Not drawn:")[2]
        assert 'src="http' not in html
        printed = capsys.readouterr().out
        assert "this is no run of `osp-diag train`" in printed
        assert "whether held-out loss rose: fewer than two probes have it" in printed
        assert "Nothing got worse: kurtosis did not rise." in printed


@given(
    row=st.integers(0, 15),
    factor=st.floats(2.0, 50.0),
    seed=st.integers(0, 9),
)
@settings(max_examples=20, deadline=None)
def test_the_row_that_was_multiplied_is_recovered(row: int, factor: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(16, 24, generator=generator)
    after = before + 0.01 * torch.randn(16, 24, generator=generator)
    after[row] *= factor
    changes = weight_changes({"w": before}, {"w": after}).sel(parameter="w")
    assert int(changes["row"]) == row
    assert float(changes["row_ratio"]) == pytest.approx(factor, rel=0.03)
    assert float(changes["rows_beyond"]) == 1
    assert float(changes["column_deviation"]) < float(changes["row_deviation"])


@given(factor=st.floats(0.1, 30.0), decay=st.floats(-0.1, 0.1), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_factor_and_decay_of_a_step_are_recovered(factor: float, decay: float, seed: int) -> None:
    """Δ = a · Δreplay − ηλ · W."""
    random = np.random.default_rng(seed)
    weights, step = random.normal(size=(3, 8)), 0.1 * random.normal(size=(3, 8))
    moved = weights + factor * step - decay * weights
    table = fits(weights, moved, weights + step, ["a", "b", "c"])
    np.testing.assert_allclose(table["step_factor"], factor, rtol=1e-6)
    np.testing.assert_allclose(table["decay"], decay, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(table["residual"], 0, atol=1e-6)
    assert not table["is_same"].any()
