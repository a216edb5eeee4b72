"""The ablation table: every cell from the right place, what is missing said, and its two renderings."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xarray as xr

from osp_diag import open_checkpoint
from osp_diag.analyses.ablation import ablation_table, as_markdown, as_text
from osp_diag.analyses.recipes import PAPER_ORDER, recipe_labels, recipe_of
from osp_diag.errors import StoreError, TokenError, UsageError
from osp_diag.estimators.token_kurtosis import gaussian_floor
from osp_diag.quantizing.exported import measure_checkpoint
from osp_diag.quantizing.perplexity import perplexity
from osp_diag.quantizing.setting import Setting
from osp_diag.quantizing.simulate import quantized
from tests.recipe_runs import RECIPES, training_run
from tests.synthetic_runs import synthetic_run, without
from tests.tiny_checkpoints import BYTES, byte_tokenizer, llama, save

WIDTH, LENGTH = 16, 16
TOKENS = np.concatenate(
    [np.full((6, 1), BYTES), np.random.default_rng(3).integers(0, BYTES, (6, LENGTH - 1))], axis=1
)
"""Every sequence begins with BOS."""
KURTOSIS = {
    "Adam": 13.0,
    "Muon-only": 0.2,
    "Muon": 5.0,
    "Muon + SSNorm": 3.0,
    "Muon + EmbProj": 0.5,
    "OSP": 0.1,
}


def with_outlier(channel: int, factor: float):
    """A tiny Llama one of whose channels is large in every hidden state."""
    model = llama(layers=2)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, channel] *= factor
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    save(with_outlier(3, 40.0), folder / "adam", byte_tokenizer())
    save(llama(layers=2), folder / "osp")
    return {"a": folder / "adam", "o": folder / "osp"}


@pytest.fixture(scope="module")
def table(checkpoints):
    runs = {"o": training_run("OSP", [0.15, 0.1]), "a": training_run("Adam", [0.15, 2.0, 13.0])}
    runs |= {
        recipe: training_run(recipe, [0.15, KURTOSIS[recipe]])
        for recipe in RECIPES
        if recipe not in ("Adam", "OSP")
    }
    runs["sink"] = training_run("OSP", [0.2], **{"model.attention": "learned_sink"})
    measured = {key: measure_checkpoint(path, TOKENS) for key, path in checkpoints.items()}
    return ablation_table(runs, measured, TOKENS.size)


def osp(x: np.ndarray) -> np.ndarray:
    return np.maximum(np.mean(x**4, -1) / np.var(x, -1, ddof=1) ** 2 - 3, 0)


def hidden(path, ids: np.ndarray) -> list[np.ndarray]:
    model = open_checkpoint(path).model
    with torch.no_grad():
        states = model(torch.tensor(ids), output_hidden_states=True).hidden_states
    return [state.double().numpy() for state in states]


def test_rows_are_the_papers_in_its_order_and_then_others(table):
    assert table["recipe"].values.tolist() == [*PAPER_ORDER, "OSP, learned sink"]
    assert table["run"].values.tolist()[:2] == ["a", "Muon-only"]
    assert table["measured_on"].sel(recipe="Adam") == "exported checkpoint"
    assert table["measured_on"].sel(recipe="Muon") == "last probe of the run"
    assert table["sequence_length"].sel(recipe=["Adam", "Muon"]).values.tolist() == [LENGTH, 8]
    assert table["step"].sel(recipe=["Adam", "Muon"]).values.tolist() == [20, 10]


@pytest.mark.parametrize(("key", "recipe"), [("a", "Adam"), ("o", "OSP")])
def test_the_kurtosis_of_a_checkpoint_is_the_scripts(table, checkpoints, key, recipe):
    found = table["osp_kurtosis"].sel(recipe=recipe)
    states = [osp(state) for state in hidden(checkpoints[key], TOKENS)]  # (sequence, position) each
    first, later = [s[:, 0].mean() for s in states], [s[:, 1:].mean() for s in states]
    whole = [s.mean() for s in states]
    sequence = found.sel(protocol="sequence")
    np.testing.assert_allclose(sequence.sel(stratum="all"), [np.mean(whole), np.max(whole)], rtol=1e-3)
    np.testing.assert_allclose(sequence.sel(stratum="first"), [np.mean(first), np.max(first)], rtol=1e-3)
    if recipe == "OSP":  # it has no tokenizer, hence no delimiters
        np.testing.assert_allclose(sequence.sel(stratum="rest"), [np.mean(later), np.max(later)], rtol=1e-3)
        assert np.isnan(sequence.sel(stratum="delimiter")).all()
    # Without its opening tokens, where a tokenizer says which they are.
    alone = TOKENS[TOKENS != BYTES] if recipe == "Adam" else TOKENS.ravel()
    states = [osp(state).mean() for state in hidden(checkpoints[key], alone[:, None])]
    published = found.sel(protocol="osp-published", stratum="all")
    np.testing.assert_allclose(published, [np.mean(states), np.max(states)], rtol=1e-3)
    np.testing.assert_allclose(
        table["osp_kurtosis_over_floor"].sel(recipe=recipe), found / gaussian_floor(WIDTH)
    )
    assert table["floor"].sel(recipe=recipe).item() == gaussian_floor(WIDTH)
    assert table["ceiling"].sel(recipe=recipe).item() == WIDTH - 3


def test_maxima_ratios_sinks_and_perplexity_of_a_checkpoint(table, checkpoints):
    row = table.sel(recipe="Adam")
    checkpoint = open_checkpoint(checkpoints["a"], attention="eager")
    kept: dict[str, list[np.ndarray]] = {"residual_post": [], "mlp_hidden": []}
    for layer in checkpoint.model.model.layers:
        layer.register_forward_hook(lambda m, i, out: kept["residual_post"].append(out.double().numpy()))
        layer.mlp.down_proj.register_forward_hook(
            lambda m, i, out: kept["mlp_hidden"].append(i[0].double().numpy())
        )
    with torch.no_grad():
        attentions = checkpoint.model(torch.tensor(TOKENS), output_attentions=True).attentions
    for site, values in kept.items():
        peaks = [np.abs(x).max() for x in values]
        np.testing.assert_allclose(
            row["absolute_maximum"].sel(site=site), [np.mean(peaks), np.max(peaks)], rtol=1e-5
        )
    magnitudes = [np.sort(np.abs(x), -1) for x in kept["residual_post"]]
    ratios = [(x[..., -1] / x[..., WIDTH // 2 - 1]).mean() for x in magnitudes]
    np.testing.assert_allclose(
        row["max_median_ratio"].sel(stratum="all"), [np.mean(ratios), np.max(ratios)], rtol=1e-4
    )
    rates = [float((a.mean(-2)[..., 0] > 0.3).double().mean()) for a in attentions]
    np.testing.assert_allclose(row["sink_rate"], [np.mean(rates), np.max(rates)], atol=1e-6)
    assert row["epsilon"].item() == 0.3
    full = perplexity(checkpoint.model, TOKENS).perplexity
    with quantized(checkpoint.model, Setting()):
        rounded = perplexity(checkpoint.model, TOKENS).perplexity
    np.testing.assert_allclose(row["perplexity"].sel(precision=["full", "W4A4"]), [full, rounded], rtol=1e-5)
    assert full != rounded
    of_paper = row["paper_perplexity"]
    np.testing.assert_allclose(of_paper.sel(bits="16-16-16"), full, rtol=1e-5)
    with quantized(checkpoint.model, Setting(4, 8, 8), method="ffn-hadamard", convention="osp"):
        rounded = perplexity(checkpoint.model, TOKENS).perplexity
    np.testing.assert_allclose(of_paper.sel(ffn_hadamard="yes", bits="4-8-8"), rounded, rtol=1e-5)
    assert np.isfinite(of_paper).all()


def test_what_a_run_alone_tells(table):
    row = table.sel(recipe="Muon")
    kurtosis = row["osp_kurtosis"].sel(protocol="sequence")
    np.testing.assert_allclose(kurtosis.sel(reduction="mean"), [5.0, 50.0, 5.0, 2.5])
    np.testing.assert_allclose(kurtosis.sel(reduction="largest"), [5.0, 50.0, 5.0, 2.5])
    np.testing.assert_allclose(row["absolute_maximum"].sel(site="residual_post"), [502 / 3, 500])
    np.testing.assert_allclose(row["absolute_maximum"].sel(site="mlp_hidden"), [34, 100])
    assert row["floor"].item() == gaussian_floor(128)
    assert np.isnan(row["osp_kurtosis"].sel(protocol="osp-published")).all()
    assert np.isnan(row["perplexity"]).all()
    assert row["absent"].item().startswith("no exported checkpoint was given")
    assert table["absent"].sel(recipe="OSP, learned sink").item() == (
        "attention with learned sink cannot be exported to a Hugging Face Llama, so perplexity and the "
        "osp-published protocol were not measured"
    )
    assert table["absent"].sel(recipe="Adam").item() == ""


def test_training_gives_loss_and_speed():
    run = training_run("Adam", [0.1] * 21)  # 201 records
    row = ablation_table({"x": run}, {}, TOKENS.size).isel(recipe=0)
    losses = run.series["loss"].values
    assert row["loss"].item() == pytest.approx(losses[-5:].mean())
    assert row["tokens_per_second"].item() == 1100.0
    assert row["held_out_loss"].item() == 3.25
    table = ablation_table({"x": without(run, ["series", "attention", "mlp_hidden"])}, {}, TOKENS.size)
    assert np.isnan(table["loss"]).all()
    assert np.isnan(table["sink_rate"]).all()
    assert np.isnan(table["absolute_maximum"].sel(site="mlp_hidden")).all()
    said = table["absent"].item()
    for part in ("holds no series loss", "no site 'attention'", "no site 'mlp_hidden'"):
        assert part in said
    assert "Adam" in as_text(table)
    bare = ablation_table({"x": without(run, ["embedding"])}, {}, TOKENS.size)
    assert "osp_excess_kurtosis was not measured at embedding" in bare["absent"].item()


def test_seeds_and_repetitions_are_told_apart():
    assert {name: recipe_of(config) for name, config in RECIPES.items()} == {name: name for name in RECIPES}
    base = {**RECIPES["OSP"], "seed": 0}
    assert recipe_of(base | {"optimizer.name": "soap"}) == "SOAP + SSNorm + EmbProj"
    assert recipe_of(base | {"model.norm": "srmsnorm", "model.attention": "gated"}) == (
        "Muon + SRMSNorm + EmbProj, gated"
    )
    seeds = {"x": base, "y": base | {"seed": 1}, "z": {**RECIPES["Adam"], "seed": 0}}
    assert recipe_labels(seeds) == {"z": "Adam", "x": "OSP, seed 0", "y": "OSP, seed 1"}
    twins = {"x": base, "y": base}
    assert recipe_labels(twins) == {"x": "OSP, seed 0, x", "y": "OSP, seed 0, y"}


def test_markdown_and_text_say_the_same_numbers(table):
    markdown, text = as_markdown(table), as_text(table)
    of_recipes, of_paper = markdown.split("\n\n")[:2]
    rows = of_recipes.splitlines()
    assert len(rows) == 2 + 7
    assert {line.replace("\\|", "").count("|") for line in rows} == {16}
    adam = table.sel(recipe="Adam")
    for said in (
        f"{adam['osp_kurtosis'].sel(protocol='sequence', stratum='all', reduction='mean').item():.3g}",
        f"{adam['perplexity'].sel(precision='W4A4').item():.3g}",
        "T = 8 / 16",
        "96 held-out tokens",
    ):
        assert said in markdown
        assert said in text
    heading, _, plain, rotated, *_ = of_paper.splitlines()
    assert heading == "| perplexity | FFN Hadamard | 16-16-16 | 4-8-16 | 4-8-8 | 4-4-16 | 4-4-4 |"
    assert plain.startswith("| Adam | – | ")
    assert rotated.startswith("|  | yes | ")
    muon = next(line for line in rows if line.startswith("| Muon |"))
    assert muon.split(" | ")[1:7] == ["5 (5)", f"{5 / gaussian_floor(128):.3g}", "50", "5", "2.5", "–"]
    assert (
        "– of Muon-only / Muon / Muon + SSNorm / Muon + EmbProj: no exported checkpoint was given" in markdown
    )
    assert max(map(len, text.splitlines())) <= 110
    assert "Muon + EmbProj" in text


def test_the_dataset_is_labelled_and_is_plain_data(table, tmp_path):
    assert all("definition" in table[name].attrs for name in table.data_vars)
    assert table["osp_kurtosis"].dims == ("recipe", "protocol", "stratum", "reduction")
    plain = json.loads(json.dumps(table.to_dict()))
    assert plain["coords"]["measured_on"]["data"][0] == "exported checkpoint"
    table.to_netcdf(tmp_path / "table.nc")
    with xr.open_dataset(tmp_path / "table.nc") as again:
        np.testing.assert_allclose(again["osp_kurtosis"], table["osp_kurtosis"])
        assert again["absent"].values.tolist() == table["absent"].values.tolist()


def test_what_is_refused(checkpoints):
    run = training_run("OSP", [0.1])
    with pytest.raises(UsageError, match=r"^ablation_table needs at least one run$"):
        ablation_table({}, {}, TOKENS.size)
    with pytest.raises(UsageError, match=r"there is no run named a; the runs are o$"):
        ablation_table({"o": run}, checkpoints, TOKENS.size)
    with pytest.raises(
        StoreError, match=r"made-up-60M does not say its recipe \(its attribute `config` lacks"
    ):
        ablation_table({"o": synthetic_run()}, {}, TOKENS.size)
    with pytest.raises(TokenError, match="outside the model's vocabulary"):
        measure_checkpoint(checkpoints["o"], TOKENS + 100)
