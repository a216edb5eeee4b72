"""The weights of a checkpoint as they lie in its files, read tensor by tensor, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from osp_diag.checkpoints.loaded import without_wrappers
from osp_diag.checkpoints.weight_files import WeightFiles, check_safetensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["StoredTensors"]

FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of safetensors that weights have → their names in torch; others hold indices, or packed weights."""


class StoredTensors(Mapping[str, "Tensor"]):
    """Name → weights, mapped from the files of a checkpoint: a tensor is read when it is asked for.

    Names are without what DDP, torch.compile and FSDP add. Tensors that are no floating-point numbers, or
    empty, are left out; of those that share their memory (a tied head) the first is there.

    Parameters
    ----------
    files : of the weights, known to be whole

    Raises
    ------
    CheckpointError : a pickle holds more than tensors, or no state_dict
    """

    def __init__(self, files: WeightFiles) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Name → size."""
        self.dtypes: dict[str, str] = {}
        """Name → type, as it is stored."""
        self._files: dict[str, tuple[Path, str]] = {}
        self._states: dict[Path, Mapping[str, Any]] = {}
        for path in files.paths:
            if path.suffix == ".safetensors":
                self._add_safetensors(path)
            else:
                self._add_pickle(path)

    def _add_safetensors(self, path: Path) -> None:
        for key, entry in check_safetensors(path).items():
            if key != "__metadata__" and entry["dtype"] in FLOATING:
                self._add(path, key, tuple(entry["shape"]), FLOATING[entry["dtype"]])

    def _add_pickle(self, path: Path) -> None:
        from osp_diag.checkpoints.pretrained import state_in

        state = self._states[path] = state_in(path, mapped=True)
        places = set()
        for key, value in state.items():
            place = (value.data_ptr(), tuple(value.shape), value.stride())
            if value.is_floating_point() and place not in places:
                places.add(place)
                self._add(path, key, tuple(value.shape), str(value.dtype).removeprefix("torch."))

    def _add(self, path: Path, key: str, shape: tuple[int, ...], dtype: str) -> None:
        if 0 in shape:
            return
        name = without_wrappers(key)
        self._files[name] = (path, key)
        self.shapes[name], self.dtypes[name] = shape, dtype

    def __getitem__(self, name: str) -> Tensor:
        path, key = self._files[name]
        if path in self._states:
            return self._states[path][key]
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
