"""Weight outliers: the definition, its laws, the ways modules hold a down projection, and a probe of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import osp_diag
from osp_diag.capture.down_projection import down_projection
from osp_diag.cli.main import main
from osp_diag.errors import EstimatorError, SiteError
from osp_diag.estimators import Suite, merge_states, weight_outliers
from osp_diag.estimators._arrays import namespace_of
from osp_diag.estimators.weight_outliers import WeightObservation, WeightOutliers
from osp_diag.probing import relabel
from tests.families import FAMILIES
from tests.site_reference import built, odd_model
from tests.tiny_checkpoints import byte_tokenizer, gpt2, llama, save

SUITE = Suite([WeightOutliers()])
SITE = "mlp_down_weight"
namespace_of(torch.zeros(1))  # a compiled function has to find the namespace already there


def matrices(seed: int = 0, experts: int = 3, rows: int = 14, channels: int = 9) -> np.ndarray:
    """Random weights with an outlier, and a column of zeros."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(4, (experts, rows, channels)) * np.exp(rng.normal(size=(experts, 1, channels)))
    weight[-1, rows // 2, 1] *= 40
    weight[:, :, 2] = 0
    return weight.astype(np.float32)


def oracle(weight: np.ndarray) -> dict[str, Any]:
    """In float64 by the definition, of finite weights."""
    magnitude = np.abs(weight.astype(np.float64))
    mean = magnitude.mean(axis=1, keepdims=True)
    ratio = np.divide(magnitude, mean, out=np.ones_like(magnitude), where=mean > 0)
    column, row = ratio.max(axis=(0, 1)), ratio.max(axis=(0, 2))
    expert, at_row, at_column = np.unravel_index(ratio.argmax(), ratio.shape)
    return {
        "weight_outlier_ratio": column,
        "weight_outlier_row_ratio": row,
        "weight_outlier_ratio_max": ratio.max(),
        "weight_outlier_ratio_median": np.sort(column)[(len(column) - 1) // 2],
        "weight_outlier_channel": at_column,
        "weight_outlier_row": at_row,
        "weight_outlier_expert": expert,
        "weight_outlier_nonfinite_columns": 0,
    }


def finalised(state: Any, layout: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(output.values) for name, output in SUITE.finalise(state, layout).items()}


def found_in(weight: Any) -> dict[str, np.ndarray]:
    observation = WeightObservation(weight)
    state = SUITE.update(SUITE.init(observation.layout, weight), observation)
    return finalised(state, observation.layout)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, Any], rtol: float = 2e-6) -> None:
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=rtol, err_msg=name)


def measured_by(backend: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    to = {"numpy": np.asarray, "jax": jnp.asarray}.get(backend, torch.as_tensor)
    measure: Callable[[Any], Any] = lambda w: SUITE.measure(WeightObservation(w))  # noqa: E731
    if backend == "jax":
        measure = jax.jit(measure)
    elif backend == "torch-compiled":
        torch.compiler.reset()
        measure = torch.compile(measure, fullgraph=True, backend="aot_eager")
    layout = WeightObservation(weight).layout
    return finalised(SUITE.merge(SUITE.init(layout, to(weight)), measure(to(weight))), layout)


# -- the definition ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "block"),
    [
        *((backend, block) for backend in ("numpy", "torch") for block in (1, 40, 2**22)),
        # Of one column each, blocks are many turns of a loop, all of which are traced.
        *((backend, block) for backend in ("jax", "torch-compiled") for block in (40, 2**22)),
    ],
)
def test_against_the_formula_in_float64(backend: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_outliers, "_BLOCK_ELEMENTS", block)
    sizes = {"rows": 5, "channels": 4}  # enough for several blocks, of which a traced loop keeps every turn
    weights = [matrices(1, experts=1, **sizes), matrices(2, experts=7, **sizes)]
    if backend in ("numpy", "torch"):
        weights += [matrices(), matrices(1, experts=1)]
    for weight in weights:
        assert_same(measured_by(backend, weight), oracle(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    weight = torch.as_tensor(matrices()).to(dtype)
    assert_same(found_in(weight), oracle(weight.double().numpy()))


def test_bounds() -> None:
    even = found_in(-3 * np.ones((1, 6, 4), np.float32))
    assert even["weight_outlier_ratio"].tolist() == [1, 1, 1, 1]
    single = np.zeros((1, 6, 4), np.float32)
    single[0, 5, 3] = -1e-30
    found = found_in(single)
    assert found["weight_outlier_ratio"].tolist() == [1, 1, 1, pytest.approx(6)]
    places = [found[f"weight_outlier_{name}"] for name in ("channel", "row", "expert")]
    assert places == [3, 5, 0]


def test_columns_that_are_not_finite_are_left_out_and_counted() -> None:
    weight = matrices(experts=2)
    weight[0, 3, 4], weight[1, 0, 4], weight[1, 2, 7] = np.nan, np.inf, -np.inf
    found = found_in(weight)
    assert found["weight_outlier_nonfinite_columns"] == 2
    assert np.isnan(found["weight_outlier_ratio"]).tolist() == [False] * 4 + [True] + [False] * 4
    rest = oracle(np.delete(weight, [4, 7], axis=2))
    np.testing.assert_allclose(np.delete(found["weight_outlier_ratio"], [4, 7]), rest["weight_outlier_ratio"])
    assert found["weight_outlier_ratio"][7] == pytest.approx(
        oracle(weight[:1, :, 7:8])["weight_outlier_ratio_max"]
    )
    nothing = found_in(np.full((1, 3, 2), np.nan, np.float32))
    assert nothing["weight_outlier_nonfinite_columns"] == 2
    assert all(np.isnan(v).all() for name, v in nothing.items() if "nonfinite" not in name)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-12, 1e12), power=st.integers(-8, 8))
def test_scaling_a_matrix_or_its_columns_changes_nothing(seed: int, scale: float, power: int) -> None:
    weight = matrices(seed)
    expected = found_in(weight)
    assert_same(found_in((weight * scale).astype(np.float32)), expected, rtol=1e-5)
    columns = 2.0 ** (power * (np.arange(9) % 3)).astype(np.float32)
    assert_same(found_in(weight * columns), expected, rtol=1e-6)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 4), again=st.booleans())
def test_merging_is_associative_and_seeing_weights_twice_changes_nothing(
    seed: int, cut: int, again: bool
) -> None:
    weight = matrices(seed, experts=1, channels=6)
    layout = WeightObservation(weight).layout
    # What ranks hold that have other experts of one layer: as many states.
    others = [matrices(seed + n, experts=1, channels=6) for n in range(1, 5)]
    states = [SUITE.measure(WeightObservation(w)) for w in (weight, *others)]
    fields = SUITE.fields(layout)
    left = right = SUITE.init(layout, weight)
    for state in states:
        left = merge_states(fields, left, state)
    for state in [*states[cut:], *states[:cut], *(states[:2] if again else [])]:
        right = merge_states(fields, state, right)
    assert_same(finalised(left, layout), finalised(right, layout), rtol=0)
    whole = found_in(np.concatenate([weight, *others]))
    for name in ("ratio", "row_ratio", "ratio_max", "channel", "row"):
        np.testing.assert_array_equal(
            finalised(left, layout)[f"weight_outlier_{name}"], whole[f"weight_outlier_{name}"]
        )


def test_finalise_keeps_leading_axes() -> None:
    states = [SUITE.measure(WeightObservation(matrices(seed))) for seed in range(4)]
    stacked = {k: np.stack([s[k] for s in states]).reshape(2, 2, *np.shape(states[0][k])) for k in states[0]}
    layout = WeightObservation(matrices()).layout
    found = finalised(stacked, layout)
    for n, state in enumerate(states):
        for name, value in finalised(state, layout).items():
            np.testing.assert_array_equal(found[name][n // 2, n % 2], value, err_msg=name)


def test_a_plain_matrix_is_refused_with_what_to_do() -> None:
    with pytest.raises(EstimatorError, match=r"\(expert, row, channel\).*got \(4, 3\).*weight\[None\]"):
        WeightObservation(np.ones((4, 3)))


# -- the ways modules hold it ------------------------------------------------------------------------------


class Packed(nn.Module):
    def __init__(self, weight: torch.Tensor, name: str = "weight", **facts: Any) -> None:
        super().__init__()
        setattr(self, name, nn.Parameter(weight, requires_grad=False))
        for key, value in facts.items():
            setattr(self, key, value)


class Conv1D(Packed):
    """As GPT-2 has it: (input, output)."""


class Subclass(nn.Parameter):
    pass


def test_rows_are_output_channels_however_the_module_stores_them() -> None:
    weight = torch.arange(12.0).reshape(3, 4)  # 4 → 3
    hidden = torch.zeros(2, 5, 4)
    for module in (Packed(weight), Conv1D(weight.T.contiguous()), Packed(weight.T.contiguous())):
        found = down_projection(module, hidden)
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found[0], weight)
    square = torch.arange(16.0).reshape(4, 4)
    for module, expected in ((Packed(square), square), (Conv1D(square), square.T)):
        assert torch.equal(down_projection(module, hidden)[0], expected)  # type: ignore[arg-type]


def test_experts_tell_rows_from_columns_by_their_sizes_or_say_so() -> None:
    weight, state = torch.randn(5, 4, 6), torch.zeros(2, 4)
    for stored in (weight, weight.transpose(1, 2).contiguous()):
        found = down_projection(Packed(stored, "down_proj"), state)
        assert torch.equal(found, weight)  # type: ignore[arg-type]
    square = torch.randn(5, 4, 4)
    assert "square" in down_projection(Packed(square, "down_proj"), state)
    told = down_projection(Packed(square, "down_proj", is_transposed=True), state)
    assert torch.equal(told, square.transpose(1, 2))  # type: ignore[arg-type]
    assert "not one alone is named" in down_projection(Packed(weight, "matrices"), state)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(4, 3, dtype=torch.uint8), r"quantised \(uint8\)"),
        (torch.zeros(3, 4).to(torch.float8_e4m3fn), r"quantised \(float8_e4m3fn\)"),
        (torch.zeros(5, 1), r"shape \(5, 1\) is no matrix over 4 input channels"),
        (torch.zeros(3, 4, device="meta"), "on no device"),
    ],
)
def test_weights_that_cannot_be_read_say_why(weight: torch.Tensor, reason: str) -> None:
    import re

    said = down_projection(Packed(weight), torch.zeros(1, 4))
    assert isinstance(said, str)
    assert re.search(reason, said)
    module = Packed(weight)
    module.weight = Subclass(torch.zeros(3, 4))
    assert down_projection(module, torch.zeros(1, 4)) == "its weight is stored as Subclass"


# -- probed ------------------------------------------------------------------------------------------------


def own_weight(module: nn.Module) -> np.ndarray:
    return module.weight.detach()[None].numpy()  # type: ignore[operator, union-attr]


def at_layer(run: Any, layer: int, step: int = 0) -> dict[str, np.ndarray]:
    found = run.at(SITE).sel(step=step, layer=layer)
    return {
        str(name): value.values
        for name, value in found.data_vars.items()
        if value.attrs["estimator"] == "weight_outliers/1"
    }


def test_a_probe_records_them_by_default(tmp_path) -> None:
    model, out = llama(), tmp_path / "run.zarr"
    run = osp_diag.probe(model, tokenizer=byte_tokenizer(), tokens=64, seq_len=16, batch_size=1, out=out)
    for layer, block in enumerate(model.model.layers):
        assert_same(at_layer(run, layer), oracle(own_weight(block.mlp.down_proj)))
    dataset = run.at(SITE)
    ratio = dataset["weight_outlier_ratio"]
    assert dict(ratio.sizes) == {"step": 1, "layer": 2, "channel": 24}
    assert ratio.attrs["units"] == "1"
    assert (ratio.attrs["floor"], ratio.attrs["ceiling"]) == (1, 16)
    assert "An et al. 2025" in ratio.attrs["source"]
    assert dataset.sizes["output_channel"] == 16
    assert SITE in run.sites
    assert "weight_outliers/1" in run.estimators
    again = relabel(run, SITE)
    assert all(again[name].equals(dataset[name]) for name in dataset)


def test_it_is_followed_over_training_by_the_weights_of_each_step() -> None:
    model, ids = FAMILIES["llama"].build().train(), FAMILIES["llama"].inputs()
    down = model.model.layers[1].mlp.down_proj  # type: ignore[union-attr]
    probe = osp_diag.Probe(model, every=2, sites=[SITE])
    expected = {}
    for step in range(5):
        expected[step] = oracle(own_weight(down).copy())
        with probe.step(step):
            for _ in range(2):  # two micro-batches; the weights change inside the block afterwards
                model(**ids)
            with torch.no_grad():
                down.weight[3, step] += 5
    assert probe.run.steps.tolist() == [0, 2, 4]
    for step in (0, 2, 4):
        assert_same(at_layer(probe.run, 1, step), expected[step])
    ratio = probe.run.at(SITE)["weight_outlier_ratio"].sel(layer=1)
    changed = [np.flatnonzero(ratio.sel(step=step) != ratio.sel(step=step - 2)) for step in (2, 4)]
    assert [channels.tolist() for channels in changed] == [[0, 1], [2, 3]]


def test_a_pass_that_raises_does_not_lose_them() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    probe = osp_diag.Probe(model, sites=[SITE])

    def failing(*_: Any) -> None:
        raise RuntimeError("mid-pass")

    with torch.no_grad(), probe.step(0):
        handle = model.lm_head.register_forward_hook(failing)
        with pytest.raises(RuntimeError, match="mid-pass"):
            model(**batch)
        handle.remove()
        model(**batch)
    assert at_layer(probe.run, 0)["weight_outlier_ratio_max"] > 1


def test_conv1d_and_other_families() -> None:
    run = osp_diag.probe(gpt2(), tokenizer=byte_tokenizer(), tokens=32, seq_len=16)
    transposed = gpt2().transformer.h[1].mlp.c_proj.weight.detach().T[None].numpy()
    assert run.at(SITE).sizes["channel"] == 64
    assert_same(at_layer(run, 1), oracle(transposed))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_them_or_says_why(name: str) -> None:
    model = built(name)
    probe = osp_diag.Probe(model, sites=["mlp_*"] if name != "mamba" else None)
    if SITE in probe.absent:
        assert probe.absent[SITE] == probe.absent["mlp_hidden"] == "no MLP in the block"
        return
    with torch.no_grad(), probe.step(0):
        model(**FAMILIES[name].inputs())
    assert SITE not in probe.absent
    hidden, weights = probe.run.at("mlp_hidden"), probe.run.at(SITE)
    assert weights["layer"].values.tolist() == hidden["layer"].values.tolist() == [0, 1]
    assert weights.sizes["channel"] == hidden.sizes["channel"]
    assert weights.sizes["output_channel"] == 32
    assert (weights["weight_outlier_ratio_max"] > 1).all()


@pytest.mark.parametrize(("name", "transposed"), [("mixtral", False), ("gpt_oss", True)])
def test_each_expert_s_columns_are_its_own(name: str, transposed: bool) -> None:
    model = built(name)
    probe = osp_diag.Probe(model, sites=[SITE])
    with torch.no_grad(), probe.step(0):
        model(**FAMILIES[name].inputs())
    experts = model.get_submodule(probe.site_map.expert_layers[1])
    stacked = experts.down_proj.detach().numpy()
    expected = oracle(stacked.transpose(0, 2, 1) if transposed else stacked)
    assert_same(at_layer(probe.run, 1), expected)
    assert 0 <= expected["weight_outlier_expert"] < len(stacked)


def test_where_there_is_none_the_run_says_so() -> None:
    assert osp_diag.Probe(built("mamba")).absent[SITE] == "no MLP in the block"
    model = llama()
    for block in model.model.layers:
        block.mlp.down_proj.weight = Subclass(block.mlp.down_proj.weight.detach())
    run = osp_diag.probe(model, tokenizer=byte_tokenizer(), tokens=32, seq_len=16)
    assert SITE not in run.sites  # nor what goes in and comes out
    assert run.absent_sites[SITE] == "its weight is stored as Subclass"
    with pytest.raises(osp_diag.OspDiagError, match="has no site 'mlp_down_weight': its weight is stored"):
        run.at(SITE)


def test_a_named_hidden_state_brings_its_projection_and_the_weight_cannot_be_named() -> None:
    named = osp_diag.Probe(odd_model(), named_sites={"mlp_hidden": "orchard.*.plum.2"})
    assert SITE in named.site_map.sites
    elsewhere = osp_diag.Probe(odd_model(), named_sites={"mlp_hidden": "orchard.*.plum.1:output"})
    assert "not a projection's input" in elsewhere.absent[SITE]
    with pytest.raises(SiteError, match="name that input as mlp_hidden"):
        osp_diag.Probe(odd_model(), named_sites={SITE: "orchard.*.plum.2"})


def test_the_command_lists_and_records_them(tmp_path, capfd) -> None:
    path, out = save(llama(), tmp_path / "tiny", byte_tokenizer()), tmp_path / "run.zarr"
    words = ["--tokens", "64", "--seq-len", "16", "--single-protocol", "--out", str(out)]
    assert main(["probe", str(path), *words]) == 0
    expected = oracle(own_weight(llama().model.layers[0].mlp.down_proj))
    assert_same(at_layer(osp_diag.open_run(out), 0), expected)
    assert main(["probe", str(path), "--list-sites"]) == 0
    assert "weight of model.layers.0.mlp.down_proj" in capfd.readouterr().out
    assert main(["estimators", "weight_outliers"]) == 0
    assert "An et al. 2025" in capfd.readouterr().out
