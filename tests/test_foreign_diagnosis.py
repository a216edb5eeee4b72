"""A diagnosis of another loop's run: what its checkpoints tell is named, and what they cannot is said."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import osp_diag
from osp_diag.analyses.diagnosis.findings import Bracket, Diagnosis, Finding
from osp_diag.analyses.diagnosis.rates import is_jump
from osp_diag.checkpoints.saved_steps import saved_in
from osp_diag.checkpoints.stored_tensors import StoredTensors
from osp_diag.cli.main import main
from osp_diag.errors import UsageError
from osp_diag.runs.run import Run, open_run
from osp_diag.tokens import make_batches
from osp_diag.trainer.callbacks import OutlierProbeCallback
from osp_diag.trainer.laboratory import ForeignLaboratory, laboratory, weight_changes
from tests.tiny_checkpoints import byte_tokenizer, llama
from tests.training_loops import token_ids, transformers

WATCHED: dict[str, Any] = {
    "sites": ["embedding", "residual_post", "final_norm"],
    "estimators": ["osp_excess_kurtosis"],
}
DOWN = "model.layers.1.mlp.down_proj.weight"


class Planted(transformers.TrainerCallback):
    """Does something before the update after a step."""

    def __init__(self, faults: dict[int, Callable[..., None]]) -> None:
        self.faults = faults

    def on_step_begin(self, args, state, control, **parts):
        self.faults.get(state.global_step, lambda **_: None)(**parts)


@torch.no_grad()
def row_times_ten(model: Any, **_: Any) -> None:
    model.get_parameter(DOWN)[7] *= 10


def rate_and_rotary_base(model: Any, optimizer: Any, lr_scheduler: Any, **_: Any) -> None:
    model.config.rope_parameters["rope_theta"] = 100.0
    lr_scheduler.base_lrs = [10 * rate for rate in lr_scheduler.base_lrs]
    for group in optimizer.param_groups:
        group["lr"], group["initial_lr"] = 10 * group["lr"], 10 * group["initial_lr"]


def trained(folder: Path, faults: dict[int, Callable[..., None]]) -> Path:
    """What the Trainer of transformers leaves of eight steps, probed on built-in text at each checkpoint."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "<s>"
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in token_ids(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "output"),
        max_steps=8,
        save_steps=2,
        logging_steps=1,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    tokens = make_batches(tokenizer, tokens=256, seq_len=64)
    model = llama().train()
    with OutlierProbeCallback(tokens, out=folder / "run.zarr", every=2, **WATCHED) as probe:
        callbacks = [Planted(faults), probe]
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
        )
        trainer.train()
    return folder


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("healthy"), {})


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A row edited in step 5; a rotary base and a rate changed in step 7."""
    return trained(tmp_path_factory.mktemp("faulty"), {4: row_times_ten, 6: rate_and_rotary_base})


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def the(diagnosis: Diagnosis, family: str) -> Finding:
    findings = [finding for finding in diagnosis.findings if finding.family == family]
    assert len(findings) == 1, str(diagnosis)
    return findings[0]


def lacks(diagnosis: Diagnosis, text: str) -> bool:
    return any(text in sentence for sentence in diagnosis.not_recorded)


def test_nothing_is_named_in_a_healthy_run_and_missing_records_are(healthy: Path) -> None:
    before = contents(healthy)
    diagnosis = open_run(healthy / "run.zarr").diagnose(replay=2, verify=2)
    assert contents(healthy) == before
    assert diagnosis.findings == (), str(diagnosis)
    assert "the learning rate that was logged rises nowhere as no schedule would" in diagnosis.ruled_out
    assert "today's code gives the kurtosis that was probed at steps 2, 6, 8, to 2%" in diagnosis.ruled_out
    assert any(text.startswith("nothing that decides a number changed in") for text in diagnosis.ruled_out)
    assert "no weights changed otherwise than by steps of training after the checkpoint of step 4" in (
        diagnosis.ruled_out
    )
    assert lacks(diagnosis, "the batches, and which of them came when")
    assert lacks(diagnosis, "so that a replay, remedies and short trainings cannot be tried")
    assert lacks(diagnosis, "clipping of gradients, and which optimizer moves which parameter")


def test_three_faults_are_named_with_place_and_bracket(faulty: Path) -> None:
    diagnosis = open_run(faulty / "run.zarr").diagnose()
    edit, rate, function = (the(diagnosis, name) for name in ("weight_edit", "learning_rate", "function"))
    assert len(diagnosis.findings) == 3
    assert edit.cause.startswith("row 7 of down_proj of layer 1 × about 9")
    assert (edit.confidence, edit.bracket) == ("measured", Bracket(4, 6))
    assert (edit.place.parameter, edit.place.row) == ((DOWN,), 7)
    undone = f"with row 7 of {DOWN} as at step 4, the checkpoint of step 6 has kurtosis "
    assert any(text.startswith(undone) and "loss on built-in" in text for text in edit.evidence)
    assert rate.cause == "learning rate × 10 (0.003 → 0.03)"
    assert (rate.confidence, rate.bracket) == ("proved", Bracket(7, 8))
    assert function.cause == "base of the rotary frequencies (RoPE): 10000.0 → 100.0"
    assert (function.confidence, function.bracket) == ("proved", Bracket(6, 8))
    assert function.evidence[0].startswith("config.json at checkpoint-8 says model.rope_theta")
    assert edit.remedy is not None
    assert edit.remedy.text.startswith("go on from checkpoint-4, before it")
    assert edit.remedy.command == ""


def test_a_directory_that_is_named_on_the_command_line(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the states of the optimizer, trainer_state.json still tells the rate."""
    moved = shutil.copytree(faulty / "output", tmp_path / "moved", ignore=shutil.ignore_patterns("optim*"))
    words = ["diagnose", str(faulty / "run.zarr"), "--checkpoints", str(moved), "--json"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    families = {finding["family"] for finding in printed["findings"]}
    assert families == {"weight_edit", "learning_rate", "function"}
    missing = " ".join(printed["not_recorded"])
    assert "constants of the optimizer at checkpoint-2, checkpoint-4, checkpoint-6, checkpoint-8:" in (
        missing
    )


def test_a_run_whose_checkpoints_are_gone_says_where_they_were(healthy: Path, tmp_path: Path) -> None:
    run = open_run(healthy / "run.zarr")
    run.tree.attrs["checkpoint_folder"] = str(tmp_path / "gone")
    diagnosis = run.diagnose()
    assert lacks(diagnosis, f"the run says that its checkpoints lie in {tmp_path / 'gone'}: ")
    assert diagnosis.findings == ()
    with pytest.raises(UsageError, match="holds no checkpoints: no directory such as checkpoint-500"):
        laboratory(run, checkpoints=tmp_path)


def test_checkpoints_that_were_probed_are_found_and_recognised(healthy: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(healthy / "output", tmp_path / "output")
    for step in (2, 8):
        shutil.rmtree(folder / f"checkpoint-{step}")
    run = osp_diag.probe_series(folder, tokens=128, seq_len=64, **WATCHED)
    shutil.rmtree(folder / "checkpoint-6")
    shutil.copytree(healthy / "output" / "checkpoint-8", folder / "checkpoint-6")
    lab = laboratory(run)
    assert isinstance(lab, ForeignLaboratory)
    assert [record.step for record in lab.functions([4, 6])] == [4]
    assert any("is not the checkpoint that the run measured at step 6" in text for text in lab.missing)


class TestFilesOfTensors:
    """Lightning's .ckpt and state dicts by hand: no model to run, so the weights alone are compared."""

    @pytest.fixture
    def files(self, tmp_path: Path) -> Path:
        torch.manual_seed(0)
        model = llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(1, 5):
            for weight in model.parameters():
                weight.grad = torch.randn_like(weight)
            optimizer.step()
            if step == 4:
                row_times_ten(model)
            state = {f"model.{name}": value for name, value in model.state_dict().items()}
            whole = {"state_dict": state, "global_step": step, "optimizer_states": [optimizer.state_dict()]}
            torch.save(whole, tmp_path / f"epoch=0-step={step}.ckpt")
        return tmp_path

    def test_an_edit_is_placed_and_that_no_model_is_there_is_said(self, files: Path, tmp_path: Path) -> None:
        run = Run.in_memory([], {}, {})
        diagnosis = run.diagnose(checkpoints=files)
        edit = the(diagnosis, "weight_edit")
        assert edit.cause.startswith("row 7 of down_proj of layer 1 × about 9")
        assert edit.bracket == Bracket(3, 4)
        assert lacks(diagnosis, "what undoing an edit at step 4 changes: ")
        assert len(diagnosis.findings) == 1

    def test_what_would_run_code_is_left_out_by_name(self, files: Path) -> None:
        class Harmful:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (files / "touched",))

        torch.save({"state_dict": Harmful(), "global_step": 9}, files / "step-9.ckpt")
        lab = laboratory(Run.in_memory([], {}, {}), checkpoints=files)
        assert lab is not None
        assert [state.step for state in lab.checkpoints] == [1, 2, 3, 4]
        assert any("step-9.ckpt" in text for text in lab.missing)
        assert not (files / "touched").exists()


def test_tensors_are_those_of_the_model_whatever_they_lie_in(healthy: Path, tmp_path: Path) -> None:
    one = saved_in(healthy / "output")[0][0]
    stored = StoredTensors(one.files)
    state = transformers.LlamaForCausalLM.from_pretrained(one.path).state_dict()
    torch.save(state, tmp_path / "step-1.pt")
    mapped = StoredTensors(saved_in(tmp_path)[0][0].files)
    assert dict(stored).keys() == mapped.shapes.keys()
    for name, value in state.items():
        assert torch.equal(stored[name], value)
        assert torch.equal(mapped[name], value)
        assert stored.shapes[name] == tuple(value.shape)


def test_a_token_that_occurs_for_the_first_time_is_no_edit() -> None:
    generator = torch.Generator().manual_seed(0)
    earlier = torch.randn(50, 8, generator=generator)
    before = earlier.clone()
    before[1:] += torch.randn(49, 8, generator=generator)
    after = before + 0.01
    after[0] = 20 * torch.randn(8, generator=generator)
    alone = weight_changes({"w": before}, {"w": after})
    known = weight_changes({"w": before}, {"w": after}, earlier=lambda name: earlier)
    assert (float(alone["row"][0]), float(alone["is_same"][0])) == (0, 0)
    assert float(alone["row_deviation"][0]) > 2 > 0.5 > float(known["row_deviation"][0])


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "restarts": lambda done: 0.5 * (1 + math.cos(math.pi * (3 * done % 1))),
    "steps": lambda done: 0.1 ** int(3 * done),
    "inverse": lambda done: 1 / math.sqrt(1 + 99 * done),
}


@given(
    shape=st.sampled_from(sorted(SCHEDULES)),
    warmup=st.integers(0, 60),
    every=st.integers(1, 25),
    place=st.floats(0.3, 0.9),
    factor=st.floats(3, 30),
)
@settings(max_examples=50, deadline=None)
def test_no_schedule_jumps_and_a_rate_above_all_before_does(
    shape: str, warmup: int, every: int, place: float, factor: float
) -> None:
    steps = np.arange(every, 401, every)

    def rate(step: int) -> float:
        if step < warmup:
            return 1e-3 * step / warmup
        return 1e-3 * SCHEDULES[shape]((step - warmup) / (401 - warmup))

    values = np.array([rate(step) for step in steps])
    assert not any(is_jump(steps, values, index) for index in range(len(values)))
    changed = max(2, int(place * len(values)))
    falls = shape != "restarts" and steps[changed - 2] >= warmup
    if falls and values[changed] * factor > 2.1 * values[:changed].max():
        values[changed:] *= factor
        assert is_jump(steps, values, changed)
