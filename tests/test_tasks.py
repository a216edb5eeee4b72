"""Accuracy on tasks: numbers against an own computation in float64, a run's table, groups and the verb."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch

from osp_diag import figures, open_run
from osp_diag.checkpoints import open_checkpoint
from osp_diag.checkpoints.checkpoint import assemble
from osp_diag.cli.main import main
from osp_diag.errors import StoreError, TokenError, UsageError
from osp_diag.quantizing.setting import Setting
from osp_diag.quantizing.simulate import quantized
from osp_diag.quantizing.tasks.evaluation import evaluate_tasks
from osp_diag.quantizing.tasks.groups import GROUPS, group_mean
from osp_diag.quantizing.tasks.loading import load_tasks, quiet_harness
from osp_diag.quantizing.tasks.results import (
    TaskResult,
    mean_of,
    settings_of,
    store_task_results,
    task_results_of,
)
from tests.run_fixtures import write_run
from tests.synthetic_runs import OUTLIER_FREE, synthetic_run, without
from tests.task_files import QUESTIONS, write_tasks
from tests.tiny_checkpoints import BYTES, bert, byte_tokenizer, llama, save

FULL, FOUR = Setting(16, 16, 16), Setting(4, 4, 4)


@pytest.fixture(scope="module")
def checkpoint():
    """Weights of size, so that answers differ."""
    model = llama()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return assemble(model, byte_tokenizer(), name="tiny", source="tiny")


def ids(text: str) -> list[int]:
    return list(byte_tokenizer()(text, add_special_tokens=False)["input_ids"])


def log_likelihood(model, context: str, continuation: str, opening: tuple[int, ...] = ()) -> float:
    """Σ log p of the continuation, of one sequence in float64."""
    first, whole = [*opening, *ids(context)], [*opening, *ids(context + continuation)]
    logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(logits[place - 1, whole[place]]) for place in range(len(first), len(whole)))


def expected(model, metric: str, opening: tuple[int, ...] = ()) -> list[bool]:
    right = []
    for question, choices, gold in QUESTIONS:
        scores = [log_likelihood(model, f"Question: {question}\nAnswer:", f" {c}", opening) for c in choices]
        if metric == "acc_norm":
            scores = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        right.append(int(np.argmax(scores)) == gold)
    return right


def greedy(model, text: str, most: int = 6) -> str:
    """Up to the letter e, of which the task says that it stops there."""
    row = ids(text)
    for _ in range(most):
        row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return byte_tokenizer().decode(row[len(ids(text)) :]).partition("e")[0]


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """``echo`` wants what the model says at full precision, but of the last question."""
    with torch.no_grad():
        answers = [greedy(checkpoint.model, question) for question, *_ in QUESTIONS]
    return write_tasks(tmp_path_factory.mktemp("tasks"), [*answers[:-1], "never this"])


@pytest.fixture(scope="module")
def results(checkpoint, folder):
    told, handed = [], []
    found = evaluate_tasks(
        checkpoint,
        ["colours", "echo"],
        [FULL, FOUR, FULL],
        include_path=folder,
        batch_size=3,
        progress=lambda *now: told.append(now),
        after_setting=handed.append,
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [row for rows in handed for row in rows] == found
    return found


# -- the numbers -----------------------------------------------------------------------------------------


def test_choices_are_judged_by_the_log_likelihood_of_an_own_computation(checkpoint, results):
    for row, setting in zip(results[::2], (FULL, FOUR), strict=True):
        model = copy.deepcopy(checkpoint.model)
        with torch.no_grad(), quantized(model, setting):
            right = expected(model, "acc_norm")
        assert row.accuracy == np.mean(right)
        assert row.standard_error == pytest.approx(np.std(right, ddof=1) / math.sqrt(5))
        assert (row.task, row.metric, row.documents, row.shots) == ("colours", "acc_norm", 5, 0)
        assert row.task_version == "2.0"
        assert row.bits == setting
    assert [row.method for row in results[::2]] == ["none", "rtn"]


def test_generated_answers_are_greedy_and_end_at_the_stop_text(results):
    assert (results[1].task, results[1].metric, results[1].accuracy) == ("echo", "exact_match", 0.8)
    assert results[3].accuracy <= 0.8


def test_log_likelihoods_are_those_of_lm_evals_own_model(checkpoint):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from osp_diag.quantizing.tasks.language_model import CheckpointModel

    pairs = [("A bird", " sang"), ("A bird", " was"), ("Of ", "e"), ("", "then"), ("x" * 70, " and y")]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    ours = CheckpointModel(checkpoint, batch_size=2)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    other = HFLM(checkpoint.model, tokenizer=byte_tokenizer(), batch_size=2)
    theirs = other.loglikelihood(asked, disable_tqdm=True)
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in theirs], rtol=1e-5)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in theirs]
    assert ours.truncated == 1


def test_sequences_begin_as_asked_and_the_results_say_so(checkpoint, folder):
    row = evaluate_tasks(checkpoint, ["colours"], [FULL], include_path=folder, bos="yes")[0]
    assert row.bos == "yes"
    with torch.no_grad():
        assert row.accuracy == np.mean(expected(checkpoint.model, "acc_norm", opening=(BYTES,)))


def test_the_convention_of_the_release_puts_no_bos(folder, checkpoint):
    opening = assemble(checkpoint.model, byte_tokenizer(puts_bos=True), name="tiny", source="tiny")
    for convention, bos in (("plain", "yes"), ("osp", "no")):
        options = {"include_path": folder, "convention": convention, "limit": 1}
        assert evaluate_tasks(opening, ["colours"], [FULL], **options)[0].bos == bos


def test_solved_examples_are_the_same_under_every_setting(checkpoint, folder, monkeypatch):
    from osp_diag.quantizing.tasks.language_model import CheckpointModel

    prompts = []
    plain = CheckpointModel.loglikelihood

    def noting(self, requests, **more):
        prompts.append([request.args for request in requests])
        return plain(self, requests, **more)

    monkeypatch.setattr(CheckpointModel, "loglikelihood", noting)
    rows = evaluate_tasks(checkpoint, ["colours"], [FULL, FOUR], include_path=folder, shots=1, limit=2)
    assert prompts[0] == prompts[1]
    assert prompts[0][0][0].count("Question:") == 2
    assert {(row.shots, row.limit, row.documents) for row in rows} == {(1, 2, 2)}


# -- the questions of the release ------------------------------------------------------------------------

DOCUMENTS = {
    "allenai/ai2_arc": {
        "question": "Why?",
        "choices": {"text": ["so", "no"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "tau/commonsense_qa": {
        "question": "Where?",
        "choices": {"text": ["here", "there"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "openai/gsm8k": {"question": "1 + 1?", "answer": "Two. #### 2"},
    "Rowan/hellaswag": {
        "activity_label": "Rain",
        "ctx_a": "It [a] falls.",
        "ctx_b": "then he",
        "endings": ["runs.", "stays [title] dry."],
        "label": "1",
    },
    "cais/mmlu": {"subject": "high_school_law", "question": "Who?", "choices": ["he", "she"], "answer": 1},
    "allenai/openbookqa": {
        "question_stem": "The sun",
        "choices": {"text": ["shines", "sings"], "label": ["A", "B"]},
        "answerKey": "A ",
    },
    "baber/piqa": {"goal": "Open it", "sol1": "pull", "sol2": "push", "label": 1},
    "lighteval/siqa": {
        "context": "He left.",
        "question": "Why?",
        "answerA": "rain",
        "answerB": "sun",
        "answerC": "ice",
        "label": "3",
    },
    "mandarjoshi/trivia_qa": {"question": "Capital?", "answer": {"aliases": ["Paris", "Lutetia"]}},
    "allenai/winogrande": {
        "sentence": "The cup fell since _ was small.",
        "option1": "the cup",
        "option2": "he",
        "answer": "1",
    },
}
LAW = "The following are questions about high school law.\nQuestion: Who?\nAnswer:"
ASKED = {
    "osp_arc_easy": ("Question: Why?\nAnswer:", [" so", " no"], 1),
    "osp_arc_challenge": ("Question: Why?\nAnswer:", [" so", " no"], 1),
    "osp_commonsense_qa": ("Where?", [" here", " there"], 0),
    "osp_hellaswag": ("Rain: It falls. Then he ", [" runs.", " stays. dry."], 1),
    "osp_mmlu": (LAW, [" he", " she"], 1),
    "osp_openbookqa": ("The sun", [" shines", " sings"], 0),
    "osp_piqa": ("Question: Open it\nAnswer:", [" pull", " push"], 1),
    "osp_social_iqa": ("He left. Why?", [" rain", " sun", " ice"], 2),
    "osp_winogrande": ("The cup fell since ", ["the cup was small.", "he was small."], 0),
}


def test_osp_published_asks_what_the_release_asks(monkeypatch):
    import datasets

    def local(path, name=None, **_):
        rows = datasets.Dataset.from_list([DOCUMENTS[path]] * 9)
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", local)
    for entry in load_tasks(["osp-published"]):
        (leaf,) = entry.tree["tasks"].values()
        with quiet_harness():
            leaf.build_all_requests(limit=1, rank=0, world_size=1)
        first = leaf.instances[0]
        if entry.task.name in ASKED:
            question, choices, gold = ASKED[entry.task.name]
            assert [instance.args for instance in leaf.instances] == [(question, c) for c in choices]
            assert int(leaf.doc_to_target(first.doc)) == gold
            assert entry.task.metric in leaf.process_results(first.doc, [(0.0, True)] * len(choices))
            continue
        name = entry.task.name.removeprefix("osp_")
        context, options = first.args
        question, answer, most = {
            "gsm8k": ("Question: 1 + 1?\nAnswer:", " Two. #### 2", 256),
            "triviaqa": ("Question: Capital?\nAnswer:", " Paris", 20),
        }[name]
        assert context == f"{question}{answer}\n\n" * entry.task.shots + question
        assert (options["max_gen_toks"], options["until"]) == (most, ["Question:", "Question"])
        first.resps.append(f"{answer} \n")
        leaf.apply_filters()
        response = first.filtered_resps[entry.task.filter]
        assert leaf.process_results(first.doc, [response]) == {"exact_match": 1.0}


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["away"]}, r"the documents of the task 'away' are not here .*HF_HOME.*--include-path"),
        ({"tasks": ["ten"]}, r"the documents of the task 'arc_easy' are not here"),
        ({"tasks": ["text"]}, r"'text' has no metric that is an accuracy .* it has likelihood, byte_perpl"),
        ({"tasks": []}, r"name a task, or a group of them: ten, osp-published"),
        ({"settings": []}, r"name at least one setting"),
        ({"limit": 0}, r"limit=0: ask 1 document or more"),
        ({"method": "rtm"}, r"there is no method 'rtm' of quantization; did you mean rtn"),
        ({"method": "gptq"}, r"gptq looks at activations on a text: give a calibration"),
        ({"shots": -1}, r"shots=-1: give 0 or more"),
        ({"max_length": 1000}, r"max_length=1000: tiny takes 2 to 64 tokens"),
        ({"include_path": "nowhere"}, r"--include-path nowhere: no such folder"),
    ],
)
def test_what_cannot_be_asked_is_refused(checkpoint, folder, options, message):
    with pytest.raises(UsageError, match=message):
        evaluate_tasks(checkpoint, **{"tasks": ["colours"], "include_path": folder} | options)


def test_models_that_have_no_texts_or_see_ahead_are_refused(checkpoint, folder):
    bare = assemble(llama(), None, name="bare", source="bare")
    with pytest.raises(TokenError, match=r"bare has no tokenizer, and tasks are texts; name one"):
        evaluate_tasks(bare, ["colours"], include_path=folder)
    ahead = assemble(bert(), byte_tokenizer(), name="bert", source="bert")
    with pytest.raises(
        UsageError, match=r"BertForMaskedLM is none: a prediction depends on the tokens after"
    ):
        evaluate_tasks(ahead, ["colours"], include_path=folder)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'osp-diag\[tasks\]'"):
        load_tasks(["ten"])


# -- groups and means ------------------------------------------------------------------------------------


def test_arc_counts_once_and_a_mean_with_a_task_missing_is_none():
    for group in GROUPS.values():
        assert (len(group.tasks), len(group.parts)) == (11, 10)
        scores = {task.name: 0.5 for task in group.tasks}
        easy, challenge = (task.name for task in group.tasks if task.part == "ARC")
        assert group_mean(scores | {easy: 0.9, challenge: 0.3}, group).value == pytest.approx(0.51)
        del scores[challenge]
        mean = group_mean(scores, group)
        assert math.isnan(mean.value)
        assert mean.missing == (challenge,)


def result(task: str = "piqa", accuracy: float = 0.5, **more) -> TaskResult:
    options = {"standard_error": 0.01, "documents": 100, "metric": "acc", "shots": 0} | more
    return TaskResult(task=task, accuracy=accuracy, **options)


def ten(accuracy: float, group: str = "ten", **more) -> list[TaskResult]:
    return [
        result(t.name, accuracy, shots=t.shots, metric=f"{t.metric},{t.filter}".removesuffix(",none"), **more)
        for t in GROUPS[group].tasks
    ]


def test_a_mean_is_of_one_setting_asked_with_the_groups_shots():
    four = {"weight_bits": 4, "activation_bits": 4, "method": "rtn", "convention": "plain"}
    rows = [*ten(0.4), *ten(0.3, **four), *ten(0.9, limit=8)]
    full, quantised, tried = settings_of(rows)
    assert mean_of(rows, full).value == pytest.approx(0.4)
    assert mean_of(rows, quantised).value == pytest.approx(0.3)
    assert mean_of(rows, tried).value == pytest.approx(0.9)
    assert mean_of(rows, full, GROUPS["osp-published"]).missing[0] == "osp_arc_easy"
    other = [result("gsm8k", 0.4, metric="exact_match,flexible-extract", shots=5)]
    assert mean_of([*(row for row in ten(0.4) if row.task != "gsm8k"), *other], full).missing == ("gsm8k",)
    assert str(quantised) == "4-4-16 rtn, plain"


# -- the group of a run ----------------------------------------------------------------------------------


def test_a_run_keeps_its_results_and_those_of_other_weights_go(tmp_path):
    path = write_run(tmp_path / "run.zarr")
    before = open_run(path)["osp_excess_kurtosis"].load()
    with pytest.raises(StoreError, match=r"tiny holds no results on tasks; measure with `osp-diag tasks"):
        task_results_of(open_run(path))
    store_task_results(path, [result(), result("boolq", 0.6)])
    store_task_results(path, [result(accuracy=0.7), result(accuracy=0.2, weight_bits=4, method="rtn")])
    run = open_run(path)
    found = {(row.task, row.weight_bits): row.accuracy for row in task_results_of(run)}
    assert found == {("piqa", 16): 0.7, ("boolq", 16): 0.6, ("piqa", 4): 0.2}
    assert run.tree["tasks"]["accuracy"].attrs["units"] == "1"
    assert "tasks" not in run.sites
    np.testing.assert_array_equal(run["osp_excess_kurtosis"].load(), before)
    store_task_results(path, [result(model_fingerprint="other")])
    assert len(task_results_of(open_run(path))) == 1


# -- what is read of a run -------------------------------------------------------------------------------


def test_a_summary_says_the_means_and_of_a_group_no_more():
    summary = synthetic_run().summary()
    means = {name: values["mean of ten"] for name, values in summary.task_accuracy.items()}
    assert means == {
        "16-16-16, BOS no": pytest.approx(0.409),
        "4-4-4 rtn, plain, BOS no": pytest.approx(0.309),
    }
    assert summary.task_accuracy["16-16-16, BOS no"]["piqa"] == pytest.approx(0.44)
    text = " ".join(summary.text().split())
    assert "Accuracy on tasks at 16-16-16, BOS no: mean of ten 40.9%" in text
    assert "piqa" not in text
    assert "task_accuracy" not in synthetic_run(few_bits=False).summary().as_dict()


def test_a_scatter_of_the_means_with_the_diagonal():
    runs = [synthetic_run(), synthetic_run(OUTLIER_FREE)]
    found = figures.draw("task_scatter", runs, backend="none")
    np.testing.assert_allclose(found["full"], 40.9)
    np.testing.assert_allclose(found["few_bits"], [30.9, 39.9])
    assert found.attrs["title"] == "Mean accuracy on ten tasks at W4A4KV4 against full precision"
    for said in ("ten tasks by lm-eval's own definitions (lm_eval 0.4.13), BOS no", "by rtn, grids plain"):
        assert said in found.attrs["caption"]
    one = figures.draw("task_scatter", runs, backend="none", of="piqa")
    np.testing.assert_allclose(one["few_bits"], [34, 43])


def test_runs_that_were_not_asked_alike_are_not_drawn_together():
    runs = [synthetic_run(), without(synthetic_run(OUTLIER_FREE), ["tasks"])]
    with pytest.raises(StoreError, match=r"holds no results on tasks; measure with `osp-diag tasks"):
        figures.draw("task_scatter", runs, backend="none")
    table = synthetic_run().tree["tasks"].to_dataset()
    runs[1].tree["tasks"] = table.isel(result=table["task"].values != "gsm8k")
    with pytest.raises(StoreError, match=r"not all runs hold the mean of 'ten' at 16-16-16 and 4-4-4 or"):
        figures.draw("task_scatter", runs, backend="none")
    runs[1].tree["tasks"] = table.assign(bos=("result", ["yes"] * table.sizes["result"]))
    with pytest.raises(StoreError, match=r"asked alike \(all tasks, shots, BOS, limit\): made-up"):
        figures.draw("task_scatter", runs, backend="none")


# -- the verb --------------------------------------------------------------------------------------------


def test_the_verb_adds_to_the_run_of_its_checkpoint(checkpoint, folder, tmp_path, capsys):
    path = save(checkpoint.model, tmp_path / "model", byte_tokenizer())
    fingerprint = open_checkpoint(path).fingerprint
    run = write_run(tmp_path / "run.zarr", model_fingerprint=fingerprint)
    words = ["tasks", str(path), "--tasks", "colours", "--include-path", str(folder), "--bits", "16-16-16"]
    assert main([*words, "4-4-4", "--run", str(run), "--limit", "3"]) == 0
    said = capsys.readouterr().out
    assert "accuracy in % ± standard error (lm_eval" in said
    assert "4-4-4 rtn, plain" in said
    assert "Note: only the first 3 documents of each task were asked" in said
    assert [row.limit for row in task_results_of(open_run(run))] == [3, 3]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [(row["task"], row["documents"], row["bos"]) for row in rows] == [("colours", 5, "no")]
    assert main([*words, "--run", str(write_run(tmp_path / "other.zarr"))]) == 2
    assert "whose weights are not those of model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a checkpoint to ask, or --list for the groups of tasks"),
        (["no/such/model", "--bits", "4-4"], "'4-4' is no setting; write 4-4-16"),
        (["no/such/model", "--run", "nowhere.zarr"], "no run at nowhere.zarr"),
    ],
)
def test_the_verb_refuses_before_it_opens_a_model(words, message, capsys):
    assert main(["tasks", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_groups_are_listed(capsys):
    assert main(["tasks", "--list"]) == 0
    assert "gsm8k               exact_match  8 shots   in the mean as GSM8K" in capsys.readouterr().out
    assert main(["tasks", "--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"ten", "osp-published"}
