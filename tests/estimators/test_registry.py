"""Finding estimators, what they say about themselves, the verb that prints it, and the atlas made of it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from osp_diag.cli.estimators import run
from osp_diag.cli.main import main
from osp_diag.errors import EstimatorError
from osp_diag.estimators import (
    FisherKurtosis,
    OspExcessKurtosis,
    all_estimators,
    applies_to,
    default_estimators,
    describe_outputs,
    estimator_parameters,
    get_estimator,
    registry,
)

EVERY = sorted(all_estimators().items())
REPOSITORY = Path(__file__).parents[2]

STATISTIC = '''
"""A family of one."""
from osp_diag.estimators import Estimator, Output, Source
from osp_diag.estimators.counts import TokenCount

class TokenTally(Estimator):
    """Counts tokens."""
    name, title, formula, range = "token_tally", "Tally", "n", "[0, inf)"
    sources = (Source("nobody"),)
    measurements = (TokenCount(),)

    def finalise(self, state, layout):
        return {"token_tally": Output(state["token.count"], ("stratum",))}
'''


@pytest.fixture
def fresh_registry():
    all_estimators.cache_clear()
    yield
    all_estimators.cache_clear()


@pytest.mark.parametrize(("identifier", "cls"), EVERY)
def test_metadata_is_complete(identifier: str, cls: type) -> None:
    estimator = cls()
    assert estimator.identifier == identifier
    for attribute in ("title", "formula", "unit", "range", "floor", "ceiling"):
        assert getattr(cls, attribute), attribute
    assert cls.__doc__
    assert len(cls.__doc__) > 60
    assert cls.sources
    assert all(source.citation for source in cls.sources)
    for name, output in describe_outputs(estimator).items():
        assert output.definition, name
        assert output.unit, name
        assert output.values.ndim == len(output.dims), name


def test_no_two_estimators_write_the_same_output() -> None:
    by_kind: dict[str, list[str]] = {}
    for cls in all_estimators().values():
        by_kind.setdefault(cls.observes, []).extend(describe_outputs(cls()))
    for names in by_kind.values():
        assert len(names) == len(set(names))


def test_get_by_name_and_version() -> None:
    assert isinstance(get_estimator("osp_excess_kurtosis"), OspExcessKurtosis)
    assert isinstance(get_estimator("osp_excess_kurtosis/1"), OspExcessKurtosis)
    assert get_estimator("fisher_kurtosis", quantiles=(0.5,)) == FisherKurtosis(quantiles=(0.5,))
    assert estimator_parameters(OspExcessKurtosis) == {}


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(EstimatorError, match=r"no estimator is named 'kurtosis'; did you mean .*kurtosis"):
        get_estimator("kurtosis")
    with pytest.raises(EstimatorError, match=r"no estimator is named 'zzzz'; there are \w+, "):
        get_estimator("zzzz")
    with pytest.raises(EstimatorError, match="no estimator is named 'osp_excess_kurtosis/9'"):
        get_estimator("osp_excess_kurtosis/9")
    with pytest.raises(EstimatorError, match="'osp_excess_kurtosis' has no parameter q; it takes none"):
        get_estimator("osp_excess_kurtosis", q=1)
    with pytest.raises(EstimatorError, match="has no parameter q; it takes quantiles"):
        get_estimator("fisher_kurtosis", q=1)


def test_defaults_depend_on_what_is_observed_and_where() -> None:
    def names(**choice: object) -> set[str]:
        return {estimator.name for estimator in default_estimators(**choice)}

    residual = names(observes="activation", site="residual_post")
    assert {"osp_excess_kurtosis", "massive_activations", "tweo_penalty"} <= residual
    assert "glu_spike_ratio" in names(observes="activation", site="mlp_hidden")
    assert "massive_activations" not in names(observes="activation", site="mlp_hidden")
    assert "glu_spike_ratio" not in residual
    assert "osp_excess_kurtosis" in names(observes="activation", site="linear_input:mlp.down_proj")
    assert "rotated_pearson_kurtosis" not in residual
    assert "rotated_pearson_kurtosis" in names(observes="activation", optional=True)
    assert applies_to(get_estimator("glu_spike_ratio"), "mlp_hidden")
    assert names(observes="activation").isdisjoint(names(observes="attention"))


def test_a_new_file_is_a_new_estimator(tmp_path: Path, monkeypatch, fresh_registry) -> None:
    package = importlib.import_module("osp_diag.estimators")
    (tmp_path / "tally.py").write_text(STATISTIC)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    assert get_estimator("token_tally").name == "token_tally"
    assert "token_tally" in {estimator.name for estimator in default_estimators()}
    sys.modules.pop("osp_diag.estimators.tally")


def plug(monkeypatch, value: str) -> None:
    point = EntryPoint("tally", value, registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])


def test_entry_points(tmp_path: Path, monkeypatch, fresh_registry) -> None:
    (tmp_path / "tally_of_tokens.py").write_text(STATISTIC)
    monkeypatch.syspath_prepend(str(tmp_path))
    for value in ("tally_of_tokens", "tally_of_tokens:TokenTally"):
        plug(monkeypatch, value)
        all_estimators.cache_clear()
        assert "token_tally/1" in all_estimators()
    for value, message in (
        ("tally_of_tokens:STRATA", "cannot be loaded"),
        ("tally_of_tokens:Source", "neither an Estimator class nor a module"),
        ("not_installed", "cannot be loaded: .*; fix or uninstall the package"),
    ):
        plug(monkeypatch, value)
        all_estimators.cache_clear()
        with pytest.raises(EstimatorError, match=message):
            all_estimators()


def test_a_name_defined_twice_is_refused(tmp_path: Path, monkeypatch, fresh_registry) -> None:
    (tmp_path / "tally_twice.py").write_text(STATISTIC.replace('"token_tally"', '"osp_excess_kurtosis"', 1))
    monkeypatch.syspath_prepend(str(tmp_path))
    plug(monkeypatch, "tally_twice")
    with pytest.raises(
        EstimatorError, match=r"osp_excess_kurtosis/1 is defined twice, in .*token_kurtosis and"
    ):
        all_estimators()


def test_the_verb_lists_all(capsys) -> None:
    assert run() == 0
    text = capsys.readouterr().out
    assert all(cls.name in text for cls in all_estimators().values())
    assert run(json=True) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [facts["identifier"] for facts in listed] == list(all_estimators())


def test_the_verb_explains_one(capsys) -> None:
    assert main(["estimators", "osp_excess_kurtosis"]) == 0
    text = capsys.readouterr().out
    for part in (
        "max(0, mean_j",
        "d − 3",
        "2506.19697",
        "osp_excess_kurtosis_over_floor(stratum)",
        "6m² + m⁴",
    ):
        assert part in text
    assert main(["estimators", "fisher_kurtosis/1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["quantiles"][2] == 0.5
    assert facts["outputs"]["fisher_kurtosis_quantile"]["dims"] == ["stratum", "quantile"]


def test_the_verb_refuses_an_unknown_name(capsys) -> None:
    assert main(["estimators", "osp_kurtosis"]) == 2
    assert "did you mean osp_excess_kurtosis" in capsys.readouterr().err


def test_the_atlas_is_up_to_date() -> None:
    script = [sys.executable, str(REPOSITORY / "docs" / "build_atlas.py"), "--check"]
    done = subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (REPOSITORY / "docs" / "estimators.md").read_text(encoding="utf-8")
    assert all(f'<a id="{cls.name}"></a>' in text for cls in all_estimators().values())


def test_importing_the_definitions_imports_neither_torch_nor_jax() -> None:
    code = (
        "import sys; import osp_diag.estimators as e; e.all_estimators(); e.default_estimators(); "
        "print([m for m in ('torch', 'jax', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
