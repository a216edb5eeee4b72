"""The gallery: every figure has its picture, drawn from small data, and says what determines its numbers."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest
import xarray as xr

from osp_diag import figures
from osp_diag.errors import UsageError
from tests.gallery import gallery
from tests.synthetic_runs import OUTLIER_FREE, synthetic_run

NAMES = tuple(gallery().page_entries())


def test_every_figure_has_a_picture_and_the_page_is_up_to_date(capsys):
    assert gallery().check() == []
    assert gallery().main(["--check"]) == 0
    assert gallery().main(["--chek"]) == 2
    assert "python docs/build_gallery.py --check" in capsys.readouterr().err


def test_a_figure_that_names_no_runs_is_drawn_of_made_up_ones(monkeypatch, tmp_path, new_figure):
    new_figure("a_new_one", "from osp_diag.figures.depth_profile import draw, prepare\n")
    assert gallery().check() == []  # not asked for: its author has no need to draw it
    monkeypatch.setattr(figures, "names", lambda: ["a_new_one", "sink_map"])
    shutil.copytree(gallery().RESULTS, tmp_path / "gallery" / "data")
    for constant, path in (("PICTURES", "gallery"), ("RESULTS", "gallery/data"), ("PAGE", "gallery.md")):
        monkeypatch.setattr(gallery(), constant, tmp_path / path)
    assert list(gallery().page_entries()) == ["sink_map"]
    assert gallery().main([]) == 0
    assert (tmp_path / "gallery" / "a_new_one.png").stat().st_size > 10_000
    text = (tmp_path / "gallery.md").read_text(encoding="utf-8")
    section = text.partition("## a_new_one")[2]
    assert "Of made-up runs: numbers that no model has." in section
    assert "Of made-up runs" not in text.partition("## a_new_one")[0]
    assert "osp-diag figure a_new_one runs/first.zarr runs/second.zarr --out a_new_one.png" in section


def test_the_gallery_keeps_its_order():
    order = list(gallery().entries())
    figure_1 = ["quantization_scatter", "task_scatter"]
    assert order[:5] == [*figure_1, "activation_surface", "kurtosis_dynamics", "bit_width_sweep"]
    assert order.index("weight_surface") < order.index("ablation_table") < order.index("depth_profile")


def test_a_missing_picture_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gallery(), "DOCS", tmp_path)
    monkeypatch.setattr(gallery(), "PICTURES", tmp_path / "gallery")
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "forgotten.png").touch()
    monkeypatch.setattr(gallery(), "RESULTS", tmp_path / "gallery" / "data")
    problems = gallery().check()
    assert "gallery/sink_map.png is missing" in problems
    assert "gallery/data/sink_map.nc is missing" in problems
    assert "gallery/forgotten.png belongs to no figure" in problems
    assert gallery().main(["--check"]) == 1
    assert "gallery/sink_map.png is missing" in capsys.readouterr().err


def test_the_data_are_small():
    assert sum(path.stat().st_size for path in gallery().RESULTS.iterdir()) < 2_000_000


@pytest.mark.parametrize("name", NAMES)
def test_captions_say_what_determines_the_numbers(name):
    said = gallery().load(name).attrs["caption"]
    for fact in ("sequence protocol", "BOS", "tokens in sequences of", "step ", "float32"):
        assert fact in said, fact
    assert (
        "SmolLM2-135M" in said or "Adam / " in said or "OSP: " in said or said.startswith(gallery().MADE_UP)
    )


@pytest.mark.slow
def test_every_figure_fits_one_column(tmp_path):
    """The layout finds room: matplotlib warns where it collapses, and warnings are errors."""
    for name in NAMES:
        gallery().draw(name, tmp_path / f"{name}.png", "one-column")


@pytest.mark.parametrize("name", ["activation_surface", "kurtosis_dynamics", "sink_map", "ablation_table"])
def test_what_is_stored_is_what_was_prepared(name, tmp_path, monkeypatch):
    prepared = figures.draw(name, [synthetic_run(), synthetic_run(OUTLIER_FREE)], backend="none")
    monkeypatch.setattr(gallery(), "RESULTS", tmp_path)
    gallery().store(prepared, tmp_path / f"{name}.nc")
    loaded = gallery().load(name)
    assert loaded.attrs == {key: _as_json(value) for key, value in prepared.attrs.items()}
    assert set(loaded.variables) == set(prepared.variables)
    for key, values in prepared.variables.items():
        if values.dtype.kind in "OU":
            assert loaded[key].values.astype(str).tolist() == values.values.astype(str).tolist()
        else:
            np.testing.assert_allclose(loaded[key].values, values.values, rtol=1e-6)


def _as_json(value):
    return [_as_json(part) for part in value] if isinstance(value, tuple | list) else value


# -- drawing from prepared data --------------------------------------------------------------------------


def test_prepared_data_are_drawn_again_without_the_run(tmp_path):
    data = figures.draw("fig2", synthetic_run(), backend="none")
    assert data.attrs["figure"] == "activation_surface"
    xr.testing.assert_identical(figures.draw("activation_surface", data, backend="none"), data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.draw("surface", data, out=tmp_path / "again.html")
    assert (tmp_path / "again.html").stat().st_size > 1000


def test_prepared_data_of_another_figure_or_with_options_are_refused():
    data = figures.draw("sink_map", synthetic_run(), backend="none")
    with pytest.raises(UsageError, match=r"channel_map cannot be drawn .* was prepared for sink_map"):
        figures.draw("channel_map", data)
    with pytest.raises(UsageError, match=r"was not prepared by the backend `none`"):
        figures.draw("sink_map", xr.Dataset())
    with pytest.raises(UsageError, match=r"prepared already, so epsilon cannot be chosen any more"):
        figures.draw("sink_map", data, epsilon=0.1)
