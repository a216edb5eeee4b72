"""Hugging Face checkpoints: a directory, one weights file with a configuration beside it, or a hub id."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osp_diag.checkpoints.checkpoint import Checkpoint, assemble, attention_cap
from osp_diag.checkpoints.declared import check_declared, check_model_size
from osp_diag.checkpoints.foreign_formats import foreign_format
from osp_diag.checkpoints.hub import reach
from osp_diag.checkpoints.loaded import (
    needed,
    refuse_incomplete,
    stray_prefix,
    unused_notes,
    without_wrappers,
)
from osp_diag.checkpoints.weight_files import (
    WeightFiles,
    check_pickle,
    check_safetensors,
    find_weights,
    folder_of_weights,
    read_json,
)
from osp_diag.errors import CheckpointError, TokenError
from osp_diag.quiet import quietly
from osp_diag.text.tokenizer_files import open_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Loading", "check_files", "open_directory", "open_hub", "open_weights_file", "state_in"]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tokenizer_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Loading:
    """How a checkpoint is to be opened; the fields are the options of ``open_checkpoint``."""

    dtype: str
    device: torch.device | None
    device_map: str | dict[str, Any] | None
    trust_remote_code: bool
    attention: str | None
    tokenizer: Any | None
    allow_nonfinite: bool

    def arguments(self, config: Any) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for a model of that configuration."""
        import torch

        options: dict[str, Any] = {
            "dtype": self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        }
        if self.device_map is not None:
            options["device_map"] = self.device_map
        elif self.device is not None and self.device.type != "cpu":
            options["device_map"] = {"": self.device}
        if self.attention is not None:
            options["attn_implementation"] = self.attention
        elif attention_cap(config) is not None:
            options["attn_implementation"] = "eager"  # the only one that has the cap
        return options


def open_directory(
    directory: Path, loading: Loading, *, name: str, source: str, notes: tuple[str, ...] = ()
) -> Checkpoint:
    """Open a directory with a configuration, weights and perhaps a tokenizer; ``notes`` are added to."""
    _check_configuration(directory)
    place = folder_of_weights(directory)
    weights = find_weights(place)
    check_declared(directory / "config.json", weights.paths)
    config = _config(str(directory), loading)
    _check_size(config, name, loading, weights.paths)
    tokenizer = _tokenizer_in(directory, loading)
    if place == directory:
        model, loading_notes = _load(str(directory), config, loading, name)
    else:  # where no configuration lies, which transformers would look for
        model, loading_notes = _load(None, config, loading, name, state_dict=_state_of(weights))
    return _finish(model, tokenizer, loading, name, source, notes + loading_notes)


def open_weights_file(path: Path, loading: Loading, *, source: str) -> Checkpoint:
    """Open one file of weights by the configuration in its directory."""
    directory = path.parent
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{path} holds weights, but not the model they belong to: there is no config.json beside it. Put "
            "the model's config.json there, or give a loader module:function"
        )
    index = directory / "model.safetensors.index.json"
    if path.name.startswith("model-") and index.is_file():
        raise CheckpointError(f"{path} is one shard of a model; pass its directory, {directory}")
    state = state_in(path)
    check_declared(directory / "config.json", (path,))
    config = _config(str(directory), loading)
    _check_size(config, path.name, loading, (path,))
    tokenizer = _tokenizer_in(directory, loading)
    model, notes = _load(None, config, loading, path.name, state_dict=state)
    return _finish(model, tokenizer, loading, path.stem, source, notes)


def check_files(directory: Path) -> None:
    """Refuse a directory whose configuration or weights are not there or not whole; nothing is loaded.

    Raises
    ------
    CheckpointError : the message says what is wrong, and what to do
    """
    _check_configuration(directory)
    find_weights(folder_of_weights(directory))


def open_hub(identifier: str, loading: Loading, revision: str | None = None) -> Checkpoint:
    """Open a model of the Hugging Face Hub, from the local cache where the hub cannot be reached."""
    cached_only = reach(identifier, revision)
    options: dict[str, Any] = {"local_files_only": cached_only}
    if revision is not None:
        options["revision"] = revision
    config = _config(identifier, loading, **options)
    tokenizer = loading.tokenizer
    if tokenizer is None:
        try:
            tokenizer = _opened_tokenizer(identifier, loading, **options)
        except CheckpointError:  # a hub repository does not tell beforehand whether it has one
            tokenizer = None
    model, notes = _load(identifier, config, loading, identifier, **options)
    if cached_only:
        notes += ("the hub was not reached; this is the copy in the local cache.",)
    source = identifier if revision is None else f"{identifier}@{revision}"
    return _finish(model, tokenizer, loading, identifier, source, notes)


def _finish(
    model: nn.Module, tokenizer: Any, loading: Loading, name: str, source: str, notes: tuple[str, ...]
) -> Checkpoint:
    model.eval().requires_grad_(False)
    return assemble(
        model, tokenizer, name=name, source=source, notes=notes, allow_nonfinite=loading.allow_nonfinite
    )


def _check_size(config: Any, name: str, loading: Loading, weights: Sequence[Path]) -> None:
    if loading.trust_remote_code:  # whose code is not run here once more
        return
    model_class = _model_class(config, False)
    make = model_class.from_config if "Auto" in model_class.__name__ else model_class
    with quietly():
        check_model_size(config, make, name, weights)


def _check_configuration(directory: Path) -> None:
    if (directory / "config.json").is_file():
        read_json(directory / "config.json")
        return
    if (directory / "adapter_config.json").is_file():
        base = read_json(directory / "adapter_config.json").get("base_model_name_or_path", "its base model")
        raise CheckpointError(
            f"{directory} is an adapter, not a model. Merge it into {base} (peft: merge_and_unload, "
            "save_pretrained) and pass the result"
        )
    foreign = foreign_format(directory)
    if foreign:
        raise CheckpointError(f"{directory} is not a checkpoint that can be read: {foreign}")
    inside = sorted(entry.parent.name for entry in directory.glob("*/config.json"))
    advice = (
        f"; these directories inside it have one: {', '.join(inside[:5])}"
        if inside
        else "; pass the directory that save_pretrained wrote"
    )
    raise CheckpointError(f"{directory} is not a checkpoint: it has no config.json{advice}")


def _config(location: str, loading: Loading, **options: Any) -> Any:
    import transformers

    try:
        with quietly():
            return transformers.AutoConfig.from_pretrained(
                location, trust_remote_code=loading.trust_remote_code, **options
            )
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text:
            advice = "it brings its own model code. Read that code, then pass trust_remote_code=True"
        elif "model_type" in text or "model type" in text or "Unrecognized model" in text:
            advice = (
                f"transformers {transformers.__version__} does not know its architecture: "
                f"{_first_line(error)} Update transformers, or give a loader module:function"
            )
        else:
            advice = f"its configuration cannot be read: {_first_line(error)}"
        raise CheckpointError(f"{location} cannot be opened: {advice}") from error


def _model_class(config: Any, trust_remote_code: bool) -> Any:
    """The class that was saved, where its name is known; otherwise the nearest automatic one."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if trust_remote_code:
        for name in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel"):
            if name in (getattr(config, "auto_map", None) or {}):
                return getattr(transformers, name)
    for name in getattr(config, "architectures", None) or ():
        model_class = getattr(transformers, name, None)
        if model_class is not None:
            return model_class
    kind = config.model_type
    if config.is_encoder_decoder and kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForSeq2SeqLM
    # Encoders such as BERT also have a causal variant, which nobody trains.
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _load(
    location: str | None, config: Any, loading: Loading, name: str, **options: Any
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model and what is to be said of it. Tensors that the file lacks are never made up."""
    import transformers

    model_class = _model_class(config, loading.trust_remote_code)
    model, report, notes = _under_its_names(model_class, location, config, loading, name, options)
    if report["missing_keys"] and model_class is not transformers.AutoModel:
        # A checkpoint saved without its head: the bare model may have all of its tensors.
        base_class = _bare_class(config, location)
        base, base_report, base_notes = _under_its_names(base_class, location, config, loading, name, options)
        if len(needed(base_report["missing_keys"])) < len(needed(report["missing_keys"])):
            without_head = (
                f"the weights lack the head of {model_class.__name__}, so {type(base).__name__} was opened.",
            )
            model, report = base, base_report
            notes = base_notes if needed(report["missing_keys"]) else (*base_notes, *without_head)
    refuse_incomplete(name, model, report)
    return model, notes + unused_notes(report["unexpected_keys"])


def _bare_class(config: Any, location: str | None) -> Any:
    """The model without a head. Automatic classes ask for a place; tensors in hand have none."""
    import transformers

    if location is None and type(config) in transformers.AutoModel._model_mapping:
        return transformers.AutoModel._model_mapping[type(config)]
    return transformers.AutoModel


def _under_its_names(
    model_class: Any, location: str | None, config: Any, loading: Loading, name: str, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any], tuple[str, ...]]:
    """Load weights, also those whose names have a prefix that is no part of the model's."""
    model, report = _from_pretrained(model_class, location, config, loading, name, options)
    prefix = stray_prefix(report["missing_keys"], report["unexpected_keys"])
    if prefix is None:
        return model, report, ()
    state = options.get("state_dict")
    if state is None:
        if location is None or not Path(location).is_dir():  # of the hub
            return model, report, ()
        state = _state_of(find_weights(Path(location)))
    renamed = {without_wrappers(key).removeprefix(prefix): values for key, values in state.items()}
    model, report = _from_pretrained(model_class, None, config, loading, name, {"state_dict": renamed})
    example = max(state, key=len)
    return (
        model,
        report,
        (f"names such as {example!r} were read without what stands before the model's own.",),
    )


def _from_pretrained(
    model_class: Any, location: str | None, config: Any, loading: Loading, name: str, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    arguments = loading.arguments(config)
    if "Auto" in model_class.__name__:
        arguments["trust_remote_code"] = loading.trust_remote_code
    try:
        with quietly(bars=location is not None and not Path(location).exists()):
            return model_class.from_pretrained(
                location,
                config=config,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the message can name the tensor
                **arguments,
                **options,
            )
    except Exception as error:
        raise _load_error(name, error) from error


def _load_error(name: str, error: Exception) -> CheckpointError:
    import pickle

    import torch

    if isinstance(error, pickle.UnpicklingError) or "Weights only load failed" in str(error):
        return CheckpointError(
            f"{name} is refused: its pickle holds more than tensors ({_forbidden(error)}), and reading that "
            "would run code that came with the file. Ask its author for safetensors"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return CheckpointError(
            f"{name} does not fit into the device's memory. Pass dtype='bfloat16', or device_map='auto' to "
            "spread it"
        )
    return CheckpointError(f"{name} cannot be opened: {type(error).__name__}: {_first_line(error)}")


def _forbidden(error: Exception) -> str:
    """What torch objected to, out of its long message."""
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return lines[0].rstrip(".") if lines else "torch refused it"


def state_in(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """The tensors of a file of weights; ``mapped`` leaves those of a pickle on the disk until they are used.

    Raises
    ------
    CheckpointError : it is damaged, holds more than tensors, or no state_dict
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        check_safetensors(path)
        return load_file(path)
    import torch

    check_pickle(path)
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path)
        )
    except Exception as error:
        raise _load_error(str(path), error) from error
    # Training scripts wrap the state in a dictionary beside the optimizer's; DeepSpeed calls it module.
    for key in ("state_dict", "model_state_dict", "model_state", "model", "module"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__} without tensors, not a model's state_dict"
        )
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _state_of(weights: WeightFiles) -> dict[str, Any]:
    """The tensors of all files of a checkpoint."""
    state: dict[str, Any] = {}
    for path in weights.paths:
        state |= state_in(path)
    return state


def _tokenizer_in(directory: Path, loading: Loading) -> Any | None:
    if loading.tokenizer is not None:
        return loading.tokenizer
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    return _opened_tokenizer(str(directory), loading)


def _opened_tokenizer(location: str, loading: Loading, **options: Any) -> Any:
    try:
        return open_tokenizer(location, trust_remote_code=loading.trust_remote_code, **options)
    except TokenError as error:
        raise CheckpointError(
            f"{error}. Mend its files, remove them to measure on token ids, or pass tokenizer= (--tokenizer)"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
