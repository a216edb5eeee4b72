"""``osp-diag compare``, as a user types it, on trainings of a second or two."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from osp_diag import figures
from osp_diag.cli.main import main
from osp_diag.runs.run import open_run
from osp_diag.trainer.config_values import as_dictionary
from tests.synthetic_runs import Plan, write_run
from tests.training_runs import minute


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of two steps: OSP, and Adam at half the width."""
    folder = tmp_path_factory.mktemp("trained")
    plain = {"optimizer__name": "adamw", "model__norm": "rmsnorm", "model__embedding_projection": False}
    paths = []
    for name, changes in (("osp", {}), ("adam", {**plain, "model__hidden_size": 16})):
        config = folder / f"{name}.json"
        changes |= {"name": name, "steps": 2, "checkpoint__every": 0, "probe__every": 2}
        config.write_text(json.dumps(as_dictionary(minute(**changes))))
        path = folder / f"{name}.zarr"
        assert main(["train", "--config", str(config), "--out", str(path)]) == 0
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    plan = Plan(layers=2, emergence_layer=1, sink_head=(1, 0))
    return {
        "a": write_run(folder / "a.zarr", plan),
        "b": write_run(folder / "b.zarr", replace(plan, protocol="osp-published")),
    }


# -- the verb --------------------------------------------------------------------------------------------


def test_two_trainings_are_compared(trained, tmp_path, capsys):
    capsys.readouterr()
    out = tmp_path / "compared.nc"
    assert main(["compare", *trained, "--stratum", "rest", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Channels of OSP (A, step 2) and Adam (B, step 2), rest tokens\n")
    assert "residual_post" in text
    assert "widths differ (embedding 32 and 16, " in text
    assert "Norm gains of blocks, largest over median: 1 (A), " in text
    assert "weights not compared" not in text
    assert "significance not given" in text
    assert text.endswith(f"comparison: {out}\n")
    assert max(map(len, text.splitlines()[:-1])) <= 110
    found = xr.load_dataset(out)
    assert found["profile_distance"].dims == ("site", "layer")
    assert (found["profile_distance"].sel(site="residual_post") > 0).all()
    rms = open_run(trained[0]).at("residual_post")["channel_rms"].sel(step=2, stratum="rest").values
    relative = found["relative_rms"].sel(site="residual_post", run="OSP").values[:, :32]
    np.testing.assert_allclose(relative, rms / np.sort(rms, axis=1)[:, 15:16], rtol=1e-6)
    assert "significance" in found.attrs
    assert "widths differ" in found.attrs["notes"]


def test_json_holds_the_distances(trained, capsys):
    capsys.readouterr()
    assert main(["compare", trained[0], trained[0], "--sites", "residual_post", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == [2, 2]
    assert list(found["sites"]) == ["residual_post"]
    site = found["sites"]["residual_post"]
    assert site["widths"] == [32, 32]
    assert [row["profile_distance"] for row in site["layers"]] == [0, 0]
    assert [row["concentration_distance"] for row in site["layers"]] == [0, 0]


def test_two_steps_of_one_training(trained, capsys):
    capsys.readouterr()
    assert main(["compare", trained[0], "--step", "0", "--other-step", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Channels of OSP, step 0 (A, step 0) and OSP, step 2 (B, step 2), all tokens")
    assert "unrelated" not in text


def test_help_has_an_example(capsys):
    assert main(["compare", "--help"]) == 0
    assert "osp-diag compare adam.zarr osp.zarr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{a}"], "compare: with one run ({a}) give --other-step, or give a second run"),
        (["{a}", "{a}", "{a}"], "compare takes two runs, or one and --other-step; it was given 3"),
        (["{a}", "{a}", "--out", "x.zarr"], "--out x.zarr: a comparison is written as netCDF; let the name"),
        (["{a}", "{a}", "--out", "no/x.nc"], "--out no/x.nc: the folder no does not exist; make it first"),
        (["{a}", "{a}", "--step", "5"], "the run of made-up-60M has no step 5; the nearest are 0"),
        (["{a}", "{b}"], "were probed under different protocols, sequence and osp-published"),
        (
            ["{a}", "{a}", "--sites", "x"],
            "the run of made-up-60M has no channel_rms at 'x'; it has embedding",
        ),
        (["{a}", "nowhere.zarr"], "nowhere.zarr"),
    ],
)
def test_misuse_is_a_message_and_exit_code_2(words, message, written, capsys):
    paths = written
    assert main(["compare", *(word.format(**paths) for word in words)]) == 2
    shown = capsys.readouterr()
    assert message.format(**paths) in " ".join(shown.err.split())
    assert shown.out == ""


@pytest.mark.parametrize("name", ["channel_map_comparison", "concentration_curves"])
@pytest.mark.parametrize("suffix", ["png", "html"])
def test_trainings_of_other_widths_are_drawn(name, suffix, trained, tmp_path):
    out = tmp_path / f"figure.{suffix}"
    figures.draw(name, trained, out=out)
    assert out.stat().st_size > 10_000
