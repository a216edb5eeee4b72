"""Models made by the user's own function, given as ``module:function`` or ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from osp_diag.errors import CheckpointError
from osp_diag.wording import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["call_loader", "load_from_function"]


def load_from_function(
    name: str, *, dtype: str = "auto", device: torch.device | None = None
) -> tuple[nn.Module, Any | None]:
    """Call the loader and return its model, in evaluation mode and without gradients, and tokenizer.

    Modules are looked for in the current directory too. ``dtype`` "auto" and ``device`` None leave the
    model as the function made it.

    Raises
    ------
    CheckpointError
        The module cannot be imported, has no such function, or the function fails or returns
        something else.
    """
    model, tokenizer = _model_and_tokenizer(call_loader(name), name)
    if dtype != "auto" or device is not None:
        import torch

        model = model.to(device=device, dtype=None if dtype == "auto" else getattr(torch, dtype))
    return model.eval().requires_grad_(False), tokenizer


def call_loader(name: str) -> Any:
    """What the function of that name returns, called without arguments.

    Raises
    ------
    CheckpointError
        The module cannot be imported, has no such function, or the function fails.
    """
    module_name, _, function_name = name.rpartition(":")
    function = _function(_module(module_name, name), function_name, name)
    try:
        return function()
    except Exception as error:
        raise CheckpointError(
            f"the loader {name} failed: {type(error).__name__}: {error}. It is called without arguments"
        ) from error


def _module(module_name: str, name: str) -> ModuleType:
    try:
        if module_name.endswith(".py"):
            return _module_of_file(Path(module_name).expanduser(), name)
        # A console script, unlike `python -m`, does not look where the user stands.
        sys.path.insert(0, str(Path.cwd()))
        try:
            importlib.invalidate_caches()
            return importlib.import_module(module_name)
        finally:
            sys.path.remove(str(Path.cwd()))
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise CheckpointError(
                f"the loader {name} cannot be used: there is no module {error.name!r} here or among the "
                "installed packages. A loader is module:function, importable from the current directory"
            ) from error
        raise CheckpointError(
            f"the loader {name} cannot be used: {module_name} itself imports {error.name!r}, which is not "
            "installed"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the loader {name} cannot be used: importing {module_name} failed with {type(error).__name__}: "
            f"{error}"
        ) from error


def _module_of_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise CheckpointError(f"the loader {name} cannot be used: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _function(module: ModuleType, function_name: str, name: str) -> Callable[[], Any]:
    function = getattr(module, function_name, None)
    if callable(function):
        return function
    if function is not None:
        raise CheckpointError(
            f"the loader {name} is a {type(function).__name__}, not a function; it must be callable without "
            "arguments"
        )
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    raise CheckpointError(
        f"the loader {name} does not exist: {module.__name__} has no function {function_name!r}; "
        + did_you_mean(function_name, functions)
    )


def _model_and_tokenizer(result: object, name: str) -> tuple[nn.Module, Any | None]:
    from torch import nn

    match result:
        case nn.Module():
            return result, None
        case (nn.Module() as model, tokenizer) if tokenizer is None or hasattr(tokenizer, "decode"):
            return model, tokenizer
        case tuple():
            description = f"a tuple ({', '.join(type(item).__name__ for item in result)})"
        case _:
            description = f"a {type(result).__name__}"
    raise CheckpointError(
        f"the loader {name} returned {description}; it must return an nn.Module or (nn.Module, tokenizer)"
    )
