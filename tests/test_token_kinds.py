"""Kinds of tokens beside text: which a model has, where they are, and what a run says of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import osp_diag
from osp_diag.capture.strata import strata_of
from osp_diag.capture.token_kinds import TokenKinds, token_kinds_of_words
from osp_diag.errors import CaptureError, UsageError
from osp_diag.probing.labelling import relabel
from osp_diag.sites import find_sites
from osp_diag.sites.token_kinds import recognised_token_kinds
from tests.families import FAMILIES

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 12, "patch_size": 4,
}  # fmt: skip
CLS, PATCH = {"cls": "position 0"}, {"patch": "every other token"}


def images(size: int = 12) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}


def vision(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    configuration = getattr(transformers, f"{name}Config")(**SIZES | options)
    return getattr(transformers, f"{name}Model")(configuration).eval()


def recognised(model: nn.Module, example: Any) -> dict[str, str]:
    kinds = recognised_token_kinds(model, find_sites(model, example=example), example)
    return TokenKinds(kinds).described()


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ViT", {}, CLS | PATCH),
        ("DeiT", {}, CLS | {"distillation": "position 1"} | PATCH),
        (
            "Dinov2WithRegisters",
            {"num_register_tokens": 3},
            CLS | {"register": "positions 1 to 3"} | PATCH,
        ),
        ("SiglipVision", {}, PATCH),
        ("ViTMAE", {}, CLS | PATCH),
        (
            "Yolos",
            {"image_size": [12, 12], "num_detection_tokens": 2},
            CLS | {"detection": "positions -2 to -1"} | PATCH,
        ),
    ],
)
def test_a_vision_model_tells_its_kinds_apart(name: str, options: Any, expected: dict[str, str]) -> None:
    model = vision(name, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert recognised(model, images()) == expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Mixing(nn.Module):
    """Patches that are mixed before the first block: the CLS token is in all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.cls_token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.ones(1, 1, 16))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True) for _ in range(2))

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1).cumsum(1)
        for block in self.blocks:
            x = block(x)
        return x


def test_what_cannot_be_told_apart_has_the_strata_of_text() -> None:
    assert recognised(Mixing().eval(), images()) == {}
    probe = osp_diag.Probe(Mixing().eval(), example=images(), sites=["residual_post"])
    assert probe.token_kinds is None
    assert "token_kinds" not in probe.attributes


def test_every_kind_has_its_own_numbers() -> None:
    model = vision("Dinov2WithRegisters", num_register_tokens=3)
    sites = ["embedding", "residual_post", "value", "attention"]
    probe = osp_diag.Probe(model, example=images(), sites=sites, compile=False, token_groups=2)
    larger = images(16)  # of 16 patches, not of 9
    with torch.no_grad(), probe.step(0):
        states = model(**larger, output_hidden_states=True, output_attentions=False).hidden_states
    run = probe.run
    found = run.at("embedding").isel(step=0, layer=0)
    assert found["stratum"].values.tolist() == ["all", "cls", "register", "patch"]
    assert found["token_count"].values.tolist() == [2 * 20, 2, 2 * 3, 2 * 16]
    norm = states[0].double().norm(dim=-1).numpy()
    expected = [norm.mean(), norm[:, 0].mean(), norm[:, 1:4].mean(), norm[:, 4:].mean()]
    np.testing.assert_allclose(found["token_norm"], expected, rtol=1e-6)
    mass = run.at("attention")["key_mass_share"].isel(step=0)
    np.testing.assert_allclose(mass.sel(stratum=["cls", "register", "patch"]).sum("stratum"), 1, rtol=1e-5)
    # Behind equal probabilities the shares are those of the tokens.
    np.testing.assert_allclose(mass.mean(("layer", "head"))[1:], [1 / 20, 3 / 20, 16 / 20], atol=0.02)
    for site in sites:
        again, whole = relabel(run, site), run.at(site)
        for name in whole.data_vars:
            np.testing.assert_array_equal(again[name].values, whole[name].values, err_msg=str(name))


def test_the_verdict_names_the_kind_that_carries_the_outliers() -> None:
    model = vision("Dinov2WithRegisters", num_register_tokens=3)
    with torch.no_grad():
        model.embeddings.register_tokens[0, 1, 3] = 5000.0
    probe = osp_diag.Probe(model, example=images(), compile=False)
    with torch.no_grad(), probe.step(0):
        model(**images())
    text = probe.run.summary().text()
    assert "in channel 3; 100% of them on registers" in " ".join(text.split())
    assert "CLS token" in text
    assert "first token only" not in text
    findings = {finding.rule: finding for finding in probe.run.verdict().findings}
    assert findings["massive"].stratum == "register"
    assert findings["everyday"].text.startswith("On patches, OSP kurtosis is ")


IDS = torch.tensor([[5, 9, 9, 7, 2], [9, 4, 7, 2, 9]])


def named(kinds: TokenKinds, **options: Any) -> dict[str, list]:
    strata = strata_of(IDS, options.pop("mask", None), [7], kinds=kinds, **options)
    return dict(zip(kinds.strata, strata.int().tolist(), strict=True))


def test_images_among_text_stand_beside_first_and_delimiters() -> None:
    model = FAMILIES["llama"].build()
    model.config.image_token_id = 9
    kinds = TokenKinds(recognised_token_kinds(model, find_sites(model)))
    assert kinds.described() == {"image": "token id 9"}
    assert named(kinds) == {
        "all": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
        "first": [[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
        "delimiter": [[0, 0, 0, 1, 0], [0, 0, 1, 0, 0]],
        "image": [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]],
        "rest": [[0, 0, 0, 0, 1], [0, 1, 0, 1, 0]],
    }
    probe = osp_diag.Probe(model, delimiter_ids=[7], compile=False)
    with torch.no_grad(), probe.step(0):
        model(input_ids=IDS)
    counts = probe.run.at("residual_post")["token_count"].isel(step=0, layer=0)
    assert counts["stratum"].values.tolist() == list(kinds.strata)
    assert counts.values.tolist() == [10, 1, 2, 4, 3]
    assert "nor image tokens, OSP kurtosis is" in " ".join(f.text for f in probe.run.verdict().findings)


def test_a_users_kinds() -> None:
    kinds = TokenKinds({"prompt": [0, 1], "nine": lambda ids: ids == 9, "rest": ...})
    assert kinds.strata == ("all", "prompt", "nine", "rest")
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert named(kinds, mask=mask) == {
        "all": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
        "prompt": [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]],
        "nine": [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]],
        "rest": [[0, 0, 0, 1, 1], [0, 0, 1, 1, 0]],
    }
    last = TokenKinds({"last": -1})
    assert named(last)["last"] == [[0, 0, 0, 0, 1]] * 2
    assert last.strata == ("all", "first", "delimiter", "last", "rest")
    # A pass that goes on behind a cache of three tokens.
    assert named(TokenKinds({"prompt": range(4)}), start=3)["prompt"] == [[1, 0, 0, 0, 0]] * 2
    model = FAMILIES["llama"].build()
    probe = osp_diag.Probe(model, token_kinds={"prompt": range(2)}, sites=["residual_post"], compile=False)
    with torch.no_grad(), probe.step(0):
        model(input_ids=IDS)
    assert probe.run.attrs["token_kinds"] == {"prompt": "positions 0 to 1"}
    counts = probe.run.at("residual_post")["token_count"].isel(step=0, layer=0)
    assert dict(zip(counts["stratum"].values.tolist(), counts.values.tolist(), strict=True)) == {
        "all": 10, "first": 0, "delimiter": 0, "prompt": 4, "rest": 6,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"first": 0}, "'first' cannot be the name of a kind; take a word other than all, first, delimiter"),
        ({"rest": 0}, "`rest` may stand for `...`"),
        ({"cls": 0.5}, r"the places of 'cls' are 0.5; give positions \(0, range\(1, 5\)\), a function of"),
        ({"cls": ..., "patch": ...}, "two kinds have `...`; only one can be all the other tokens"),
        ("cls", "token_kinds is 'cls'; give a mapping from each kind to where its tokens are"),
    ],
)
def test_kinds_that_are_none(kinds: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        osp_diag.MeasurementSettings(token_kinds=kinds)


def test_kinds_as_they_are_written_on_a_command_line() -> None:
    assert token_kinds_of_words(["auto"]) == "auto"
    assert token_kinds_of_words(["none"]) is None
    kinds = {"cls": [0], "register": [1, 2, 3, 4, 7, -2, -1], "patch": ...}
    assert token_kinds_of_words(["cls=0", "register=1-4,7,-2--1", "patch=..."]) == kinds
    assert token_kinds_of_words(["cls=0,register=1-4,7,-2--1,patch=..."]) == kinds
    for words in (["cls"], ["cls=4-1"], ["cls=first"], ["auto", "cls=0"], ["cls=-1-2"], ["cls="], []):
        message = "--token-kinds .*write auto, none, or KIND=PLACES such as cls=0"
        with pytest.raises(UsageError, match=message):
            token_kinds_of_words(words)
    with pytest.raises(UsageError, match="names the kind 'cls' twice"):
        token_kinds_of_words(["cls=0", "cls=1"])


def test_a_function_that_gives_something_else() -> None:
    with pytest.raises(CaptureError, match=r"of 'odd' gave torch.int64 \(2, 5\); it must give a bool tensor"):
        named(TokenKinds({"odd": lambda ids: ids % 2}))
