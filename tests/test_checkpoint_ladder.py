"""Which checkpoints stay: the ladder's law, and pins through saves, resuming, kills and bad files."""

import os
import re
import shutil
import signal
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from osp_diag.errors import TrainingError
from osp_diag.trainer.checkpoint import (
    complete_checkpoints,
    delete_checkpoints,
    folder_of,
    latest,
    without_single_process_warnings,
)
from osp_diag.trainer.checkpoint_folder import CheckpointFolder
from osp_diag.trainer.checkpoint_ladder import WIDEST, staying
from osp_diag.trainer.checkpoint_pins import PINS
from osp_diag.trainer.config import CheckpointConfig
from osp_diag.trainer.loop import train
from tests.training_runs import minute

CONFIG = minute()


@given(
    gaps=st.lists(st.integers(1, 50), min_size=1, max_size=120),
    keep=st.integers(1, 4),
    most=st.integers(0, 6),
)
def test_thinned_out_again_and_again_the_ladder_has_no_gap_wider_than_its_law(gaps, keep, most):
    config = CheckpointConfig(keep=keep, ladder=most)
    saved, there = [], set()
    for step in accumulate(gaps):
        saved.append(step)
        there = staying(there | {step}, config)
        assert there.issuperset(saved[-keep:])
        assert len(there) <= keep + most
        assert most == 0 or len(saved) <= keep or len(there) > keep
        distances = sorted(step - one for one in there)
        for near, far in pairwise(distances):
            between = [one for one in saved if step - far < one < step - near]
            assert far <= WIDEST * near or not between
        # No rung is there that its neighbours could do without.
        for near, _, far in zip(distances[keep - 1 :], distances[keep:], distances[keep + 1 :], strict=False):
            assert far > WIDEST * near


@pytest.mark.parametrize(("most", "reach"), [(1, 5), (2, 5), (3, 11), (4, 23), (5, 47), (6, 95)])
def test_rungs_reach_back_twice_as_far_with_each(most, reach):
    config, there, reached = CheckpointConfig(ladder=most), set(), []
    for step in range(1, 500):
        there = staying(there | {step}, config)
        reached.append(step - min(there))
    assert min(reached[250:]) >= reach - 3 * (most == 1)


@pytest.fixture
def saved(tmp_path):
    """Saves checkpoints of one number at the given steps, by a folder opened anew as a resumed run does."""
    with without_single_process_warnings():

        def save(*steps, **options):
            folder = CheckpointFolder(tmp_path / "run.checkpoints", CheckpointConfig(**options))
            for step in steps:
                folder.save(step, {"number": torch.tensor(float(step))}, {}, CONFIG, background=False)
            return folder

        yield save


def steps_of(folder):
    return [checkpoint.step for checkpoint in complete_checkpoints(folder.folder)]


def test_a_pinned_checkpoint_outlives_saves_and_resuming_until_it_is_unpinned(saved):
    folder = saved(2, 4, keep=1, ladder=1)
    assert folder.pin(1, "too early") is None
    assert folder.pin(3, "before the spike") == 2
    folder = saved(6, 8, keep=1, ladder=0)
    assert steps_of(folder) == [2, 8]
    assert folder.pins == {2: "before the spike"}
    assert not folder.unpin(8)
    assert folder.unpin(2)
    assert steps_of(saved(10, keep=1, ladder=0)) == [10]


def test_a_second_pin_keeps_the_first_reason(saved):
    folder = saved(2)
    for reason in ("osp-diag control", "the loss rose", "osp-diag control"):
        folder.pin(2, reason)
    assert folder.pins == {2: "osp-diag control; and the loss rose"}


def test_the_checkpoint_before_what_is_not_judged_stays(saved):
    folder = saved(keep=1, ladder=0)
    for step, judged, there in (
        (2, 2, [2]),
        (4, 2, [2, 4]),
        (6, 2, [2, 6]),
        (8, 7, [6, 8]),
        (10, 9, [8, 10]),
    ):
        folder.judged_step = judged
        folder.save(step, {"number": torch.tensor(0.0)}, {}, CONFIG, background=False)
        assert steps_of(folder) == there


def test_a_pin_is_kept_by_the_training_that_resumes(tmp_path):
    out = tmp_path / "run.zarr"
    small = {"probe__sites": ("residual_post",), "checkpoint__keep": 1, "checkpoint__ladder": 0}
    with pytest.raises(KeyboardInterrupt):
        train(
            minute(**small), out, progress=lambda step, *_: step == 2 and signal.raise_signal(signal.SIGINT)
        )
    assert CheckpointFolder(folder_of(out), CheckpointConfig()).pin(5, "kept") == 3
    train(minute(**small), out, resume=True)
    assert [checkpoint.step for checkpoint in complete_checkpoints(folder_of(out))] == [3, 6]
    train(minute(steps=1, **small), out, overwrite=True)
    assert [entry.name for entry in folder_of(out).iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "it is a list and not an object"),
        ('{"2": 3}', "the reason of step 2 is no text"),
        ('{"-2": "x"}', "'-2' is no step"),
        (" " * (2**20 + 1), "at most 1,048,576 are read"),
        (None, "is a link, which is not followed"),
    ],
)
def test_pins_that_cannot_be_read_are_refused_at_the_start_and_delete_nothing_later(
    saved, tmp_path, text, reason
):
    folder = saved(2, keep=1, ladder=0)
    secret = tmp_path / "secret"
    secret.write_text("{}")
    if text is None:
        os.symlink(secret, folder.folder / PINS)
    else:
        (folder.folder / PINS).write_text(text)
    message = (
        f"pins.json, which names .* cannot be read .*{re.escape(reason)}.*delete it to go on without pins"
    )
    with pytest.raises(TrainingError, match=message):
        saved(4)
    with pytest.warns(UserWarning, match="no checkpoint is deleted: .*pins.json"):
        folder.save(4, {"number": torch.zeros(())}, {}, CONFIG, background=False)
    assert steps_of(folder) == [2, 4]
    delete_checkpoints(folder.folder)
    assert not list(folder.folder.iterdir())
    assert secret.read_text() == "{}"


def test_a_kill_while_a_checkpoint_is_deleted_leaves_no_half_of_it(saved, monkeypatch):
    saved(2, keep=1, ladder=0)

    def killed(path, **options):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            saved(4, keep=1, ladder=0)
    folder = saved(keep=1, ladder=0)
    assert [entry.name for entry in folder.folder.iterdir()] == ["step-00000004"]
    assert latest(folder.folder).step == 4


def test_a_damaged_checkpoint_is_named_in_the_listing(saved):
    folder = saved(2, 4)
    (folder.folder / "step-00000002" / "state.json").write_text("{")
    with pytest.raises(TrainingError, match="step-00000002 is no checkpoint of this version"):
        complete_checkpoints(folder.folder)
    assert complete_checkpoints(folder.folder.with_name("none")) == []
