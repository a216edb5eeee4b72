"""The training model's kernels on a GPU: FlexAttention, compiled and not, against float64 definitions.

Run with ``TRITON_INTERPRET=0 pytest tests/test_trainer_model_cuda.py`` where there is a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from osp_diag import Probe
from osp_diag.trainer.model import Llama
from tests.llama_reference import KINDS, Reference, stirred, tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs TRITON_INTERPRET=0"),
    # torch's compiler, about itself.
    pytest.mark.filterwarnings("ignore"),
]

TOKENS = 300
DOCUMENTS = (
    torch.repeat_interleave(torch.arange(4), torch.tensor([7, 140, 3, 150])).expand(2, -1).contiguous()
)


def model_and_ids(kind: Any) -> tuple[Llama, Tensor]:
    config = tiny(attention=kind, hidden_size=128, max_length=TOKENS, query_key_norm=True)
    model = stirred(config).train()
    return model, torch.randint(97, (2, TOKENS), generator=torch.Generator().manual_seed(2))


def gradients(model: Llama, ids: Tensor, documents: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss, logits = model(ids, labels=ids, document_ids=documents)
    assert loss is not None
    loss.backward()
    found = {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach().cpu(), found


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("way", ["eager", "checkpointed", "compiled", "compiled and checkpointed"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_on_a_cpu(kind: Any, way: str, documents: Tensor | None) -> None:
    model, ids = model_and_ids(kind)
    expected = Reference(model, ids, documents).logits
    _, right = gradients(model, ids, documents)
    model.cuda().set_activation_checkpointing("checkpointed" in way)
    torch.compiler.reset()
    if "compiled" in way:
        for block in model.blocks:
            block.compile()
    logits, found = gradients(model, ids.cuda(), None if documents is None else documents.cuda())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-4)
    for name, gradient in found.items():
        scale = float(right[name].abs().max())
        torch.testing.assert_close(gradient, right[name], rtol=1e-3, atol=1e-3 * scale + 1e-6, msg=name)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_near(kind: Any, compiled: bool) -> None:
    model, ids = model_and_ids(kind)
    _, right = gradients(model, ids, DOCUMENTS)
    model.cuda()
    torch.compiler.reset()
    if compiled:
        for block in model.blocks:
            block.compile()
    with torch.autocast("cuda", torch.bfloat16):
        _, found = gradients(model, ids.cuda(), DOCUMENTS.cuda())
    for name, gradient in found.items():
        if right[name].norm() > 1e-3:
            assert torch.cosine_similarity(gradient.flatten(), right[name].flatten(), dim=0) > 0.9, name


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_probes_give_the_numbers_of_a_cpu(kind: Any, compiled: bool) -> None:
    model, ids = model_and_ids(kind)
    runs = []
    for device in ("cpu", "cuda"):
        model.to(device)
        torch.compiler.reset()
        if compiled and device == "cuda":
            for block in model.blocks:
                block.compile()
        probe = Probe(model, sites=["residual_post", "attention"])
        with torch.no_grad(), probe.step(0):
            model(ids.to(device))
        runs.append(probe.run)
    for site, name in (
        ("residual_post", "fisher_kurtosis"),
        ("attention", "key_mass"),
        ("attention", "extra_sink_mass"),
    ):
        found, expected = (run.tree[site][name].values for run in reversed(runs))
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4, err_msg=name)
