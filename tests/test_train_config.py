import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osp_diag.cli.train_config import training_config
from osp_diag.errors import UsageError
from osp_diag.trainer.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
    from_dictionary,
)
from osp_diag.trainer.config_values import as_dictionary, differences, with_changes
from osp_diag.trainer.parallel import check_ranks
from osp_diag.trainer.presets import PRESETS, ablation, preset, with_recipe
from osp_diag.trainer.recipes import recipe, recipes


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    config = preset(name)
    assert from_dictionary(json.loads(json.dumps(as_dictionary(config)))) == config


def test_the_paper_s_own_numbers():
    config = preset("osp_1_4b")
    assert config.tokens_per_step == 4_194_304
    assert config.steps * config.tokens_per_step == pytest.approx(1e12, rel=1e-5)
    assert config.schedule.warmup * config.tokens_per_step == pytest.approx(5e9, rel=1e-3)
    assert (config.model.feed_forward_size, config.model.head_size) == (5504, 128)
    assert (config.optimizer.lr, config.optimizer.embedding_lr) == (5e-4, 5e-3)
    assert with_recipe(config, "adam").optimizer.lr == 5e-3


def test_the_six_rows_differ_in_the_recipe_alone():
    rows = ablation(preset("tiny"))
    assert list(rows) == ["adam", "muon_only", "muon", "muon_ssnorm", "muon_embproj", "osp"]
    changed = {"name", "optimizer.name", "model.norm", "model.embedding_projection"}
    for config in rows.values():
        assert {line.partition(":")[0] for line in differences(preset("tiny"), config)} <= changed
    assert rows["adam"].optimizer.name == "adamw"
    assert (rows["muon_ssnorm"].model.norm, rows["muon_ssnorm"].model.embedding_projection) == (
        "ssnorm",
        False,
    )
    assert len({str(as_dictionary(config)) for config in rows.values()}) == len(recipes()) == 6


@given(
    lr=st.floats(1e-8, 1.0),
    steps=st.integers(1, 10**7),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    compile=st.booleans(),
)
def test_values_are_read_as_they_are_written(lr, steps, betas, compile):
    typed = {
        "optimizer.lr": repr(lr),
        "steps": str(steps),
        "optimizer.betas": f"{betas[0]!r}, {betas[1]!r}",
        "compile": str(compile).lower(),
    }
    config = with_changes(TrainConfig(), typed)
    assert (config.optimizer.lr, config.steps, config.compile) == (lr, steps, compile)
    assert config.optimizer.betas == betas


def test_values_that_fit_only_one_another_are_changed_together():
    config = with_changes(TrainConfig(), {"model.heads": "6", "model.hidden_size": "96"})
    assert config.model.head_size == 16
    assert with_changes(TrainConfig(), {"micro_batch_size": "none"}).micro_batch_size is None
    assert with_changes(TrainConfig(), {"data.mixture": "a/b:1,c:d:0.5"}).data.mixture == {
        "a/b": 1,
        "c:d": 0.5,
    }
    assert with_changes(TrainConfig(), {"steps": "1e3"}).steps == 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.lrr": "1"}, "no 'optimizer.lrr' in the configuration; did you mean optimizer.lr?"),
        ({"model.norm.x": "1"}, "no 'model.norm.x' in the configuration"),
        ({"model": "x"}, "model is a group of values; set one of them"),
        ({"optimizer.lr": "fast"}, "optimizer.lr='fast': give a number"),
        ({"optimizer.lr": "0"}, "optimizer.lr=0.0: give a finite number above 0"),
        ({"optimizer.lr": "nan"}, "optimizer.lr=nan: give a finite number above 0"),
        ({"optimizer.betas": "0.9,1"}, r"optimizer.betas=\(0.9, 1.0\): give values from 0 to below 1"),
        ({"steps": "2.5"}, "steps='2.5': give a whole number"),
        ({"steps": "0"}, "steps=0: give 1 or more"),
        ({"compile": "maybe"}, "compile='maybe': give true or false"),
        ({"model.norm": "layernorm"}, "model.norm='layernorm': give one of rmsnorm, ssnorm, srmsnorm"),
        ({"model.heads": "3"}, "model.hidden_size=128 does not make model.heads=3 heads of an even width"),
        ({"model.key_value_heads": "3"}, "model.key_value_heads=3 does not divide model.heads=4"),
        ({"data.source": "jsonl"}, "data.path is missing, which data.source=jsonl reads"),
        ({"data.source": "mixture"}, "data.mixture is missing, which data.source=mixture reads"),
        ({"data.sequence_length": "4096"}, "data.sequence_length=4096 is longer than model.max_length=2048"),
        ({"data.validation_fraction": "1"}, "data.validation_fraction=1.0: hold out a part"),
        ({"schedule.warmup": "1.5"}, "schedule.warmup=1.5 is neither a fraction of the steps nor a whole"),
        ({"schedule.final": "2"}, "schedule.final=2.0 is a factor of the peak"),
        ({"parallel.mode": "hsdp"}, "parallel.shard=1 under parallel.mode=hsdp shards nothing"),
        ({"divergence.spike": "0"}, "divergence.spike=0.0: give a finite number above 0"),
        ({"checkpoint.keep": "0"}, "checkpoint.keep=0: give 1 or more"),
    ],
)
def test_bad_values_are_refused_by_their_dotted_key(changes, message):
    with pytest.raises(UsageError, match=message):
        with_changes(TrainConfig(), changes)


def test_the_constructors_refuse_what_is_not_of_the_type():
    with pytest.raises(UsageError, match=r"optimizer.lr='1e-3': give a number"):
        OptimizerConfig(lr="1e-3")
    with pytest.raises(UsageError, match=r"model.layers=True: give a whole number"):
        ModelConfig(layers=True)
    with pytest.raises(UsageError, match=r"data.bos='maybe': give one of document, sequence, none"):
        DataConfig(bos="maybe")
    with pytest.raises(UsageError, match=r"schedule.name"):
        ScheduleConfig(name="linear")


@pytest.mark.parametrize(
    ("config", "ranks", "message"),
    [
        (TrainConfig(batch_size=6), 4, "batch_size=6 cannot be dealt to 4 ranks; give a multiple of 4"),
        (
            TrainConfig(batch_size=8, micro_batch_size=3),
            2,
            "micro_batch_size=3 does not divide the 4 sequences",
        ),
        (
            TrainConfig(parallel=ParallelConfig(mode="fsdp")),
            1,
            "parallel.mode=fsdp shards over ranks and there",
        ),
        (
            TrainConfig(parallel=ParallelConfig(mode="hsdp", shard=4)),
            4,
            "parallel.shard=4 does not make two or",
        ),
    ],
)
def test_ranks_that_do_not_fit_are_refused(config, ranks, message):
    with pytest.raises(UsageError, match=message):
        check_ranks(config, ranks)


def test_presets_of_one_s_own(monkeypatch):
    assert preset("osp_diag.trainer.presets:small") == preset("small")
    with pytest.raises(UsageError, match=r"there is no preset 'tinny'; did you mean tiny\?"):
        preset("tinny")
    with pytest.raises(UsageError, match="cannot be loaded: No module named 'nowhere'"):
        preset("nowhere:f")
    with pytest.raises(UsageError, match="returns list; it has to return a TrainConfig"):
        preset("builtins:list")
    with pytest.raises(UsageError, match="there is no recipe 'sgd'; there are adam, muon_only"):
        with_recipe(preset("tiny"), "sgd")


def test_the_options_of_the_verb(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"steps": 7, "optimizer.lr": 0.5}))
    assert training_config(None, file, "muon", ["steps=9"]) == with_changes(
        with_recipe(TrainConfig(), "muon"), {"steps": 9, "optimizer.lr": 0.5}
    )
    for arguments, message in [
        ((None, None, None, []), "say what to train: a preset"),
        (("tiny", file, None, []), "and not both"),
        (
            ("tiny", None, None, ["steps"]),
            "--set 'steps': write KEY=VALUE, such as optimizer.lr=1e-3; a preset comes before",
        ),
        ((None, tmp_path / "absent.json", None, []), "cannot be read: No such file"),
    ]:
        with pytest.raises(UsageError, match=message):
            training_config(*arguments)
    file.write_text("[1]")
    with pytest.raises(UsageError, match="has to be an object of dotted keys"):
        training_config(None, file, None, [])


def test_a_recipe_is_a_file_of_the_package():
    assert [(one.name, one.row) for one in recipes().values()][0::5] == [("adam", 1), ("osp", 6)]
    assert all(one.help.endswith(".") for one in recipes().values())
    large = preset("osp_1_4b")
    assert recipe("adam").changes(large)["optimizer.lr"] == large.optimizer.embedding_lr == 5e-3
    with pytest.raises(UsageError, match=r"^there is no recipe 'muon_ssnrm'; did you mean muon_ssnorm"):
        recipe("muon_ssnrm")
