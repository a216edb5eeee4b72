"""The options of a probe: one documentation, one keyword form, and refusals that name the nearest option."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import get_type_hints

import pytest

import osp_diag
from osp_diag.checkpoints.opening import OpeningOptions
from osp_diag.cli.main import main
from osp_diag.errors import EstimatorError, UsageError
from osp_diag.probing.checkpoint import OF_A_CHECKPOINT
from osp_diag.probing.settings import MeasurementOptions, MeasurementSettings, TokenOptions, TokenSettings
from osp_diag.trainer.callbacks import OutlierProbeCallback
from osp_diag.trainer.recording import IN_TRAINING, Recording, RecordingOptions, RecordingSettings
from tests.tiny_checkpoints import byte_tokenizer, llama


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (TokenSettings, TokenOptions),
        (MeasurementSettings, MeasurementOptions),
        (RecordingSettings, RecordingOptions),
    ],
)
def test_type_checkers_know_the_keywords_that_there_are(settings, options):
    hints = get_type_hints(options)
    if options is RecordingOptions:
        hints = {name: hint for name, hint in hints.items() if name not in get_type_hints(MeasurementOptions)}
    assert hints == {name: hint for name, hint in get_type_hints(settings).items() if name in hints}
    assert list(hints) == [field.name for field in fields(settings)]
    for name in hints:
        documented = re.search(rf"^(\w+, )*{name}(, \w+)*( :|$)", inspect.getdoc(settings), re.MULTILINE)
        assert documented, f"{settings.__name__} does not document {name}"


def test_the_keywords_of_a_checkpoint_are_those_of_open_checkpoint():
    keywords = inspect.get_annotations(osp_diag.open_checkpoint)
    hints = {name: reference.__forward_arg__ for name, reference in OpeningOptions.__annotations__.items()}
    assert hints == {name: hint for name, hint in keywords.items() if name not in ("source", "return")}


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (osp_diag.probe, (TokenSettings(), OF_A_CHECKPOINT)),
        (osp_diag.Probe, (MeasurementSettings(),)),
        (Recording, (RecordingSettings(), IN_TRAINING)),
        (OutlierProbeCallback, (RecordingSettings(), IN_TRAINING)),
    ],
)
def test_help_lists_every_option_with_its_default(function, defaults):
    parameters = inspect.signature(function).parameters
    for settings in defaults:
        for field in fields(settings):
            assert parameters[field.name].default == getattr(settings, field.name)
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: osp_diag.probe(None, seqlen=3), r"probe\(\) takes no 'seqlen'; did you mean seq_len\?"),
        (lambda: osp_diag.Probe(None, site=()), r"Probe\(\) takes no 'site'; did you mean sites"),
        (lambda: osp_diag.Probe(None, qqq=1), r"Probe\(\) takes no 'qqq'; there are model, every, out, "),
        (lambda: OutlierProbeCallback(weights=()), r"OutlierProbeCallback\(\) takes no 'weights'"),
    ],
)
def test_an_option_that_is_not_there_is_refused_with_the_nearest(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_what_cannot_be_meant_is_refused_by_the_settings():
    with pytest.raises(EstimatorError, match="no estimator is named 'osp_kurtosis'"):
        MeasurementSettings(estimators=["osp_kurtosis"])
    with pytest.raises(UsageError, match="token_groups=1: a bootstrap"):
        MeasurementSettings(token_groups=1)


def test_keywords_change_the_settings_that_are_handed_over():
    settings = MeasurementSettings(sites=["embedding"], keep_raw=False)
    probe = osp_diag.Probe(llama(), measurement_settings=settings, delimiter_ids=[3])
    assert probe.settings == MeasurementSettings(sites=["embedding"], keep_raw=False, delimiter_ids=[3])
    tokens = TokenSettings(tokens=32, seq_len=16)
    run = osp_diag.probe(llama(), tokens, settings, seq_len=8, tokenizer=byte_tokenizer())
    assert run.sites == ["embedding"]
    assert (run.attrs["tokens"], run.attrs["sequence_length"]) == (32, 8)
    recording = Recording(measurement_settings=settings, sites=["final_norm"], every=3)
    assert recording.measurement == MeasurementSettings(sites=["final_norm"], keep_raw=False)
    assert recording.settings.every == 3


def without_blanks(text: str) -> str:
    """The help is wrapped, in a frame."""
    return re.sub(r"[│\s]+", "", text)


def test_the_verb_shows_what_the_settings_document(capsys):
    assert main(["probe", "--help"]) == 0
    shown = without_blanks(capsys.readouterr().out)
    for field in fields(TokenSettings):
        text = re.search(rf"^{field.name}\n((?:    .*\n?)+)", inspect.getdoc(TokenSettings), re.MULTILINE)[1]
        assert f"--{field.name.replace('_', '-')}" in shown
        assert without_blanks(text) in shown
