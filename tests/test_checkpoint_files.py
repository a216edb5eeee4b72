"""Checkpoints of a training that come from a stranger: nothing of them is executed, and damage is named."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata

from osp_diag.cli.main import main
from osp_diag.errors import TrainingError
from osp_diag.trainer.checkpoint import folder_of, latest, without_single_process_warnings
from osp_diag.trainer.checkpoint_files import read_metadata
from osp_diag.trainer.checkpoint_folder import CheckpointFolder
from osp_diag.trainer.config import CheckpointConfig
from osp_diag.trainer.config_values import as_dictionary
from osp_diag.trainer.exporting import trained_model
from osp_diag.trainer.loop import train
from tests.hostile_files import refusal
from tests.training_runs import minute

CONFIG = minute(steps=2, probe__sites=("residual_post",), probe__every=2, checkpoint__every=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two steps with its one checkpoint, which no test changes."""
    out = tmp_path_factory.mktemp("whole") / "run.zarr"
    train(CONFIG, out)
    return out


@pytest.fixture
def run(whole, tmp_path):
    out = tmp_path / "run.zarr"
    shutil.copytree(whole, out)
    shutil.copytree(folder_of(whole), folder_of(out))
    return out


def step(run) -> Path:
    return latest(folder_of(run)).path


class Payload:
    """Leaves a file behind if it is unpickled by anybody who trusts it."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def with_metadata(run, change):
    """Change the metadata of the run's checkpoint as torch itself would write them."""
    file = step(run) / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(change(metadata) or metadata))


def test_what_is_read_is_what_torch_reads(run):
    path = step(run)
    ours = trained_model(latest(folder_of(run))).state_dict()
    theirs = {"model": {name: torch.zeros_like(value) for name, value in ours.items()}}
    with without_single_process_warnings():
        dcp.load(theirs, checkpoint_id=path, no_dist=True)
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours.items())


@pytest.mark.parametrize("place", ["as the metadata", "within them", "as an entry"])
@pytest.mark.parametrize("verb", ["export", "resume"])
def test_no_payload_runs(run, tmp_path, capsys, place, verb):
    trace = tmp_path / "the payload ran"

    def poison(metadata):
        if place == "as the metadata":
            return Payload(trace)
        if place == "within them":
            metadata.planner_data = Payload(trace)
        else:  # torch unpickles an entry that is declared to be no tensor
            name = "model.lm_head.weight"
            metadata.state_dict_metadata[name] = BytesStorageMetadata()
            where = next(value for key, value in metadata.storage_data.items() if key.fqn == name)
            bytes_of = pickle.dumps(Payload(trace))
            with (step(run) / where.relative_path).open("r+b") as file:
                file.seek(where.offset)
                file.write(bytes_of)
        return None

    with_metadata(run, poison)
    if verb == "export":
        words = ["export", str(run), "--out", str(tmp_path / "model")]
    else:
        described = tmp_path / "config.json"
        described.write_text(json.dumps(as_dictionary(CONFIG)))
        words = ["train", "--config", str(described), "--out", str(run), "--resume"]
    assert main(words) == 2
    assert not trace.exists()
    message = capsys.readouterr().err
    assert ".metadata" in message
    assert "defect" not in message
    if place != "as an entry":
        assert "it names posix.mkdir, which no checkpoint of osp-diag has" in message
        assert "nothing of it was run" in message


def uncovered(metadata):
    """Half of a matrix is nowhere, so that loading would leave its random numbers."""
    entry = metadata.state_dict_metadata["model.lm_head.weight"]
    half = torch.Size([entry.size[0] // 2, entry.size[1]])
    entry.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), half)]


def outside(metadata):
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"


def beyond(metadata):
    next(iter(metadata.storage_data.values())).length = 2**40


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (uncovered, "the parts of model.lm_head.weight do not make up the whole"),
        (outside, "lies in '../../secret', which is no file of this checkpoint"),
        (beyond, "goes beyond the end of __0_0.distcp"),
    ],
)
def test_metadata_that_cannot_be_true_are_refused(run, damage, message):
    with_metadata(run, damage)
    with pytest.raises(TrainingError, match=r"\.metadata is damaged .*" + message) as raised:
        trained_model(latest(folder_of(run)))
    assert "delete it to resume from the one before" in str(raised.value)


def test_a_byte_that_turned_over_is_found_and_named(run):
    entry = next(
        where
        for key, where in pickle.loads((step(run) / ".metadata").read_bytes()).storage_data.items()
        if key.fqn == "model.lm_head.weight"
    )
    file = step(run) / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[entry.offset + entry.length // 2] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(TrainingError, match=r"model.lm_head.weight in .*__0_0.distcp is damaged") as raised:
        trained_model(latest(folder_of(run)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.layers", 10**6, "its configuration has 1,000,000 layers, and the file 2"),
        ("model.vocabulary_size", 10**8, r"the configuration makes \(100000000, 32\), and the file has"),
        ("model.heads", "[" * 99, "is no checkpoint of this version"),
    ],
)
def test_a_configuration_is_held_against_the_tensors_before_a_model_is_made(run, key, value, message):
    file = step(run) / "state.json"
    state = json.loads(file.read_text())
    state["config"][key] = value
    file.write_text(json.dumps(state))
    with pytest.raises(TrainingError, match=message):
        trained_model(latest(folder_of(run)))


@pytest.mark.parametrize("text", ['{"step": ' + "[" * 10**5, '{"step": ' + "9" * 5000 + "}", "[1]", "\udc80"])
def test_a_damaged_state_is_one_sentence(run, text):
    (step(run) / "state.json").write_text(text, errors="surrogateescape")
    with pytest.raises(TrainingError, match="is no checkpoint of this version") as raised:
        latest(folder_of(run))
    assert "\n" not in str(raised.value)


def test_a_pipe_in_place_of_the_metadata_is_not_waited_for(run):
    file = step(run) / ".metadata"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(TrainingError, match=r"\.metadata cannot be read: is no plain file"):
        trained_model(latest(folder_of(run)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_metadata_damaged_anywhere_are_refused_or_read_as_what_they_say(whole, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    source = step(whole)
    os.link(source / "__0_0.distcp", folder / "__0_0.distcp")
    text = bytearray((source / ".metadata").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    (folder / ".metadata").write_bytes(text[: data.draw(st.integers(1, len(text)))])
    message = refusal(read_metadata, folder)
    assert not message or (".metadata" in message and "\n" not in message)


# Saving


def saved(folder, tensors, **options):
    checkpoints = CheckpointFolder(folder, CheckpointConfig(**options))
    with without_single_process_warnings():
        try:
            checkpoints.save(4, tensors, {}, CONFIG)
            checkpoints.wait()
        finally:
            entries = sorted(entry.name for entry in folder.iterdir())
    return entries


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_while_saving_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, background):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.torch.save", full)
    with pytest.raises(TrainingError, match=r"step-00000004 could not be written: No space left") as raised:
        saved(tmp_path, {"model": {"a": torch.ones(3)}}, background=background)
    assert "\n" not in str(raised.value)
    assert "Traceback" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("background", [False, True])
def test_a_second_signal_while_saving_asks_for_no_space_and_leaves_nothing(tmp_path, monkeypatch, background):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.torch.save", interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:
        saved(tmp_path, {"model": {"a": torch.ones(3)}}, background=background)
    (note,) = raised.value.__notes__
    assert "step-00000004 was not finished and is removed; --resume goes on" in note
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_place_of_a_checkpoint_is_not_followed(tmp_path):
    mine = tmp_path / "mine"
    (mine / "step-00000001").mkdir(parents=True)
    folder = tmp_path / "run.checkpoints"
    folder.mkdir()
    os.symlink(mine / "step-00000001", folder / "step-00000003")
    os.symlink(mine, folder / "step-00000004.part")
    assert latest(folder) is None
    assert "step-00000004" in saved(folder, {"model": {"a": torch.ones(3)}}, background=False)
    assert [entry.name for entry in mine.iterdir()] == ["step-00000001"]
