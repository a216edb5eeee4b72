"""Attention maps of single heads: the model's own T×T softmax, and what is said where it cannot be made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from osp_diag import Probe, figures
from osp_diag.errors import StoreError, UsageError
from tests.attention_reference import dense_weights, observed
from tests.families import FAMILIES, TOKENS
from tests.synthetic_runs import OUTLIER_FREE, Plan, synthetic_run, without
from tests.test_figures import data, recording

PLAN = Plan()
SEEN = (
    "llama",  # grouped queries
    "mistral",  # a window
    "gemma2",  # a soft cap under eager attention, windows, a scale of its own
    "gpt_oss",  # sink logits
    "falcon_alibi",  # a bias for each head
    "bert",  # every key is allowed
)


def kept(family, batch, tokens: int = TOKENS):
    """The run of one forward pass, and its attention calls."""
    model = family.build("eager" if "eager" in family.implementations else None)
    if family.name == "falcon_alibi":
        model = family.build("sdpa")
    probe = Probe(model, sites=["query_post_rope", "key_post_rope", "attention"], snapshot_tokens=tokens)
    with torch.no_grad(), probe.step(0):
        model(**batch)
    return probe.run, observed(model, batch)[1]


@pytest.mark.parametrize("name", [name for name in SEEN if name in FAMILIES])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_the_softmax_of_the_model(name, padded):
    family = FAMILIES[name]
    batch = family.inputs(padded=padded)
    if padded:  # from the left, in the sequence that is kept
        batch["attention_mask"][0, :2] = 0
    run, calls = kept(family, batch)
    for layer, call in enumerate(calls):
        expected = dense_weights(call)[0].numpy()
        pairs = [f"{layer}:{head}" for head in range(len(expected))]
        found = data("attention_map", run, heads=pairs)["attention"].isel(run=0).values
        np.testing.assert_allclose(np.nan_to_num(found), np.where(np.isnan(found), 0, expected), atol=1e-5)
        seen = ~np.isnan(found).all(axis=-1)
        assert seen.any()
        # What is left empty has no attention, but in queries that see nothing at all.
        assert np.where(np.isnan(found) & seen[..., None], expected, 0).max() < 1e-6


def test_a_causal_head_is_exact_of_any_beginning_and_an_encoder_is_refused():
    llama = FAMILIES["llama"]
    run, calls = kept(llama, llama.inputs(), tokens=7)
    expected = dense_weights(calls[1])[0, 3, :7, :7].numpy()
    found = data("attention_map", run, heads="1:3")
    np.testing.assert_allclose(np.nan_to_num(found["attention"].squeeze()), expected, atol=1e-5)
    assert (found["layer"].item(), found["head"].item(), found["key_head"].item()) == (1, 3, 1)
    bert, _ = kept(FAMILIES["bert"], FAMILIES["bert"].inputs(), tokens=7)
    with pytest.raises(
        StoreError, match=r"in layer 0 of .* queries also see keys behind the 7 tokens that were"
    ):
        data("attention_map", bert, heads="0:0")


def test_the_strongest_sinks_and_the_weakest_are_shown():
    run = synthetic_run(PLAN)
    found = data("attention", run)
    pairs = list(zip(found["layer"].values[0], found["head"].values[0], strict=True))
    assert pairs[0] == PLAN.sink_head
    layers = [layer for layer, _ in pairs[:3]]
    assert len(set(layers)) == 3
    mass = run.at("attention")["first_token_attention"].isel(step=-1).sel(stratum="all")
    assert mass.sel(layer=pairs[3][0], head=pairs[3][1]) == mass.min()
    query = run.snapshot("query_post_rope")["activation"].values[4, 1]
    key = run.snapshot("key_post_rope")["activation"].values[4, 0]
    logits = np.where(np.tri(24) > 0, query @ key.T / 4, -np.inf)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = weights / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.nan_to_num(found["attention"].values[0, 0]), expected, atol=1e-5)
    for said in ("First 24 tokens of the first sequence", "sink_rate/1", "step 0", "scale, mask, soft cap"):
        assert said in found.attrs["caption"]


def test_several_runs_have_a_row_each_and_name_their_own_tokens():
    small = synthetic_run(tokens=6, sequences=1, model_name="short")
    canvas = recording("attention_map", [synthetic_run(PLAN), small], tokens=8)
    assert canvas.shape == (2, 2)
    titles = [canvas.panels[place].labels["title"] for place in ((0, 0), (0, 1), (1, 0))]
    assert titles == ["made-up-60M", "", "short"]
    ticks = [call["texts"] for name, call in canvas.panels[1, 0].calls if name == "ticks"]
    assert ticks[0] == ["<s>", "The", "cost", "$5", "of", "day"]
    drawn = next(call for name, call in canvas.panels[1, 0].calls if name == "heat_map")
    assert drawn["values"].shape == (6, 6)
    assert drawn["y"][0] == 5  # queries go downwards
    assert drawn["y_texts"][-1] == "0 “<s>”"
    subtitle = canvas.panels[0, 0].labels["subtitle"]
    assert subtitle.startswith("layer 4, head 1: ")
    assert subtitle.endswith("% to the first token")


def test_tokens_are_shown_at_the_pointer_and_taken_literally():
    figure = figures.draw("attention_map", synthetic_run(tokens=4), backend="plotly", heads="0:0")
    trace = figure.data[0]
    assert trace.text[-1][0] == "query 0 \u201c&lt;s&gt;\u201d<br>key 0 \u201c&lt;s&gt;\u201d"
    assert trace.hovertemplate.startswith("%{text}<br>attention %{customdata")


def test_what_is_asked_wrongly_is_refused():
    run = synthetic_run(PLAN)
    for heads, said in (
        ("4", r"heads are LAYER:HEAD, such as 4:1, not '4'"),
        (["1:1", "9:0"], r"has no layer 9; it has 0, 1, 2, 3, 4, 5"),
        ("1:4", r"has no head 4; it has 0, 1, 2, 3"),
        ([], "names no head"),
    ):
        with pytest.raises(UsageError, match=said):
            data("attention_map", run, heads=heads)
    with pytest.raises(UsageError, match="tokens is 2 or more, not 1"):
        data("attention_map", run, tokens=1)
    with pytest.raises(UsageError, match="colours is one of linear, log, symlog, not 'grey'"):
        data("attention_map", run, colours="grey")


def test_a_run_that_lacks_something_says_what():
    with pytest.raises(StoreError, match="does not say with which scale and mask its logits are made; probe"):
        data("attention_map", without(synthetic_run(PLAN), ["snapshot/attention"]))
    with pytest.raises(StoreError, match=r"attention_map draws raw activations, and the run of made-up-osp"):
        data("attention_map", synthetic_run(OUTLIER_FREE, snapshots=False))
