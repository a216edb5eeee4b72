"""Which function a checkpoint's weights are of: code, constants, and the loss of fixed tokens."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from osp_diag.errors import TrainingError
from osp_diag.trainer import fingerprint
from osp_diag.trainer.checkpoint import folder_of, latest
from osp_diag.trainer.exporting import trained_model
from osp_diag.trainer.fingerprint import (
    code_fingerprint,
    function_constants,
    reference_loss,
    reference_tokens,
)
from osp_diag.trainer.loop import train
from osp_diag.trainer.model import Llama
from tests.training_runs import minute


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run.zarr"
    train(minute(steps=3, probe__every=0, checkpoint__every=1), out)
    return out


def test_a_checkpoint_s_function_is_made_again_to_the_bit(trained):
    checkpoint = latest(folder_of(trained))
    model = trained_model(checkpoint)
    function = checkpoint.function
    ids = torch.tensor(function["reference_ids"])
    assert ids.shape == (8, 32)
    loss = reference_loss(model, ids)
    assert loss == function["reference_loss"]
    logits = model(ids).logits.detach().double()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert function_constants(model) == function["constants"]
    assert (function["code"], function["torch"]) == (code_fingerprint(), torch.__version__)


def test_another_constant_shows_in_loss_and_constants(trained):
    checkpoint = latest(folder_of(trained))
    model = trained_model(checkpoint)
    # As code that passes the configuration over would do it.
    object.__setattr__(model.model.config, "rope_theta", 100.0)
    model.model.layers[1].input_layernorm.epsilon = 1e-3
    constants = function_constants(model)
    assert constants["rotary_base"] == 100.0
    assert constants["norm_epsilon"]["model.layers.*.input_layernorm"] == [1e-5, 1e-3]
    ids = torch.tensor(checkpoint.function["reference_ids"])
    assert reference_loss(model, ids) != checkpoint.function["reference_loss"]


def test_constants_are_observed_and_leave_the_model_as_it_was():
    changes = {"model__rope_theta": 500_000.0, "model__norm": "srmsnorm", "model__attention": "gated"}
    model = Llama(minute(**changes).model)
    constants = function_constants(model)
    assert constants["rotary_base"] == 500_000.0
    assert (constants["mask"], constants["attention"], constants["norms"]) == (
        "causal",
        ["gated"],
        ["SRMSNorm"],
    )
    assert set(constants["norm_scale"].values()) == {1.0}
    assert model.training
    assert not model.blocks[0]._forward_pre_hooks


def test_a_mask_that_is_not_causal_shows(monkeypatch):
    from osp_diag.trainer.model import attention

    def open_attention(query, key, value, *, sink_logits=None, mask=None):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    monkeypatch.setattr(attention, "attend", open_attention)
    assert function_constants(Llama(minute().model))["mask"] == "not causal"


def test_reference_tokens_are_few():
    assert reference_tokens(torch.zeros(100, 32, dtype=torch.int64)).shape == (32, 32)
    assert reference_tokens(torch.zeros(2, 4096, dtype=torch.int64)).shape == (1, 1024)


def test_the_code_s_fingerprint_is_of_every_source(monkeypatch, tmp_path):
    before = code_fingerprint()
    copy = tmp_path / "model"
    shutil.copytree(fingerprint.model_package.__path__[0], copy)
    monkeypatch.setattr(fingerprint.model_package, "__path__", [str(copy)])
    assert code_fingerprint() == before
    with (copy / "rotary.py").open("a") as file:
        file.write("\n")
    assert code_fingerprint() != before


def test_checkpoints_without_a_function_are_still_read(trained, tmp_path):
    shutil.copytree(folder_of(trained), tmp_path / "run.checkpoints")
    state = tmp_path / "run.checkpoints" / "step-00000003" / "state.json"
    contents = json.loads(state.read_text())
    del contents["function"]
    state.write_text(json.dumps(contents))
    assert latest(tmp_path / "run.checkpoints").function is None
    state.write_text(json.dumps(contents | {"function": 1}))
    with pytest.raises(TrainingError, match="its 'function' is no object"):
        latest(tmp_path / "run.checkpoints")
