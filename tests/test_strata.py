"""Strata: who is first, who is a delimiter, and that padding is nobody."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from osp_diag.capture.strata import strata_of
from osp_diag.errors import CaptureError
from osp_diag.schema import STRATA


def named(strata: torch.Tensor) -> dict[str, list]:
    return dict(zip(STRATA, strata.tolist(), strict=True))


def test_the_first_token_counts_as_first_even_if_it_is_a_delimiter():
    strata = strata_of(torch.tensor([[7, 1, 7, 2]]), None, [7])
    assert strata.dtype == torch.float32
    assert strata.shape == (4, 1, 4)
    assert named(strata) == {
        "all": [[1, 1, 1, 1]],
        "first": [[1, 0, 0, 0]],
        "delimiter": [[0, 0, 1, 0]],
        "rest": [[0, 1, 0, 1]],
    }


def test_padding_on_either_side_is_in_no_stratum():
    ids = torch.tensor([[0, 0, 7, 1], [7, 1, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])
    strata = named(strata_of(ids, mask, [0, 7]))
    assert strata["all"] == mask.tolist()
    assert strata["first"] == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert strata["delimiter"] == [[0] * 4] * 2
    assert strata["rest"] == [[0, 0, 0, 1], [0, 1, 0, 0]]


def test_position_zero_starts_each_document_of_a_packed_row():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    strata = named(strata_of(torch.tensor([[1, 2, 3, 4, 5]]), None, [4], positions))
    assert strata["first"] == [[1, 0, 0, 1, 0]]
    assert strata["delimiter"] == [[0] * 5]


def test_positions_of_padding_do_not_make_it_first():
    positions = torch.tensor([[0, 0, 0, 1]])
    mask = torch.tensor([[False, False, True, True]])
    assert named(strata_of(torch.zeros(1, 4, dtype=torch.long), mask, [], positions))["first"] == [
        [0, 0, 1, 0]
    ]


def test_positions_may_be_shared_by_the_rows():
    strata = named(strata_of(torch.ones(2, 3, dtype=torch.long), None, [], torch.tensor([0, 1, 0])))
    assert strata["first"] == [[1, 0, 1], [1, 0, 1]]


def test_length_one_sequences_are_first_tokens_only():
    strata = strata_of(torch.tensor([[7], [1]]), None, torch.tensor([7]))
    assert named(strata) == {
        "all": [[1], [1]],
        "first": [[1], [1]],
        "delimiter": [[0], [0]],
        "rest": [[0], [0]],
    }


def test_embeddings_have_no_delimiters():
    strata = named(strata_of(None, None, [7], inputs_embeds=torch.zeros(1, 3, 8)))
    assert strata["delimiter"] == [[0, 0, 0]]
    assert strata["rest"] == [[0, 1, 1]]
    assert strata_of(None, torch.ones(2, 5), [7]).shape == (4, 2, 5)


def test_a_mask_that_covers_a_cache_is_read_from_its_end():
    strata = named(strata_of(torch.ones(1, 2, dtype=torch.long), torch.tensor([[1, 1, 1, 0]]), []))
    assert strata["all"] == [[1, 0]]


def test_ids_kept_from_inference_mode_serve_outside_it():
    with torch.inference_mode():
        strata_of(torch.tensor([[1, 31]]), None, [31, 30])
    assert named(strata_of(torch.tensor([[1, 31]]), None, [31, 30]))["delimiter"] == [[0, 1]]


@given(st.data())
def test_strata_against_a_plain_loop(data):
    batch, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    ids = np.array(data.draw(st.lists(st.integers(0, 5), min_size=batch * tokens, max_size=batch * tokens)))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens)))
    ids, mask = ids.reshape(batch, tokens), mask.reshape(batch, tokens)
    delimiters = data.draw(st.lists(st.integers(-1, 6), max_size=4))
    expected = np.zeros((4, batch, tokens))
    for row in range(batch):
        seen = False
        for token in range(tokens):
            if not mask[row, token]:
                continue
            kind = 1 if not seen else 2 if ids[row, token] in delimiters else 3
            expected[[0, kind], row, token] = 1
            seen = True
    strata = strata_of(torch.tensor(ids), torch.tensor(mask), delimiters)
    np.testing.assert_array_equal(strata.numpy(), expected)
    np.testing.assert_array_equal(strata[0].numpy(), strata[1:].sum(0).numpy())


def test_what_cannot_be_read_is_refused():
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(CaptureError, match="no input_ids, inputs_embeds or attention_mask"):
        strata_of(None, None, [1])
    with pytest.raises(CaptureError, match=r"mask has shape \(2, 1, 3, 3\).*\(batch, token\) = \(2, 3\)"):
        strata_of(ids, torch.ones(2, 1, 3, 3), [1])
    with pytest.raises(CaptureError, match=r"position_ids have shape \(3, 2\)"):
        strata_of(ids, None, [1], torch.ones(3, 2))


@pytest.mark.parametrize("fill", [-1e4, float("-inf")])
@pytest.mark.parametrize("padding", [0, 2])
def test_a_mask_made_for_adding_to_logits_is_zero_for_tokens(fill: float, padding: int) -> None:
    factor = torch.ones(2, 5)
    factor[1, 5 - padding :] = 0
    additive = torch.zeros(2, 5).masked_fill(factor == 0, fill)
    ids = torch.ones(2, 5, dtype=torch.long)
    expected = strata_of(ids, factor.long(), [])
    assert torch.equal(strata_of(ids, factor, []), expected)
    assert torch.equal(strata_of(ids, additive, []), expected)
