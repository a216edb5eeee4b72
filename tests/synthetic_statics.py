"""What made-up runs hold that no step changes: texts of tokens, maps of |W|, results at few bits."""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.quantizing.cases import SINGLE_SWEEPS
from osp_diag.quantizing.results import QuantizedResult, results_dataset
from osp_diag.quantizing.tasks.groups import GROUPS
from osp_diag.quantizing.tasks.results import TaskResult, task_dataset

PLACE = (17, 40)
"""Output and input channel of the planted weight."""
FULL = 3.0
"""Loss at 16 bits."""


WORDS = (
    "<s>",
    "The",
    " cost",
    " $5",
    " of",
    " day",
    ".",
    " Then",
    " a",
    " bird",
    ",",
    " \u9ce5",
    " sang",
    "\n",
)


def token_texts(tokens: int) -> list[str]:
    """Words over and over, some of them hard to draw."""
    return [WORDS[index % len(WORDS)] for index in range(tokens)]


def weight_maps(layers: int, width: int, spike: float) -> dict[str, xr.Dataset]:
    """Two projections in three layers; W_17,40 of the middle down projection is ``spike``."""
    held = sorted({0, layers // 2, layers - 1})
    rng = np.random.default_rng(7)
    found = {}
    for name, columns in (("self_attn.o_proj", width), ("mlp.down_proj", 2 * width)):
        weight = np.abs(rng.standard_normal((len(held), width, columns))) * 0.02
        if name == "mlp.down_proj":
            weight[held.index(layers // 2), PLACE[0] % width, PLACE[1] % columns] = spike
        found[f"weight_map/{name}"] = xr.Dataset(
            {
                "weight": (("layer", "output_cell", "input_cell"), weight),
                "row_maximum": (("layer", "output_channel"), weight.max(2)),
                "column_maximum": (("layer", "input_channel"), weight.max(1)),
                "first_output_channel": (("layer", "output_cell"), [np.arange(width)] * len(held)),
                "first_input_channel": (("layer", "input_cell"), [np.arange(columns)] * len(held)),
            },
            coords={
                "layer": held,
                "output_channel": np.arange(width),
                "input_channel": np.arange(columns),
            },
        )
    return found


def loss_at(weight_bits: int, activation_bits: int, harm: float) -> float:
    """Each tensor adds 2^(4 - bits) times ``harm``, and at 16 bits nothing."""
    added = (2.0 ** (4 - bits) for bits in (weight_bits, activation_bits) if bits < 16)
    return FULL + harm * sum(added)


def task_accuracies(harm: float) -> xr.Dataset:
    """The ten tasks at full precision and at 4 bits."""
    few = {
        "weight_bits": 4,
        "activation_bits": 4,
        "key_value_bits": 4,
        "method": "rtn",
        "convention": "plain",
    }
    return task_dataset(
        [
            TaskResult(
                **setting,
                task=task.name,
                accuracy=0.3 + 0.02 * place - loss,
                standard_error=0.01,
                documents=100,
                metric=f"{task.metric},{task.filter}".removesuffix(",none"),
                shots=task.shots,
                harness="lm_eval 0.4.13",
            )
            for setting, loss in (({}, 0.0), (few, 0.1 * harm))
            for place, task in enumerate(GROUPS["ten"].tasks)
        ]
    )


def few_bits(harm: float, fingerprint: str = "made-up tokens") -> xr.Dataset:
    """The default sweep."""
    return results_dataset(
        [
            QuantizedResult(
                weight_bits=weight,
                activation_bits=activation,
                negative_log_likelihood=loss_at(weight, activation, harm),
                tokens=69,
                sequence_length=24,
                token_source="made-up text",
                token_fingerprint=fingerprint,
            )
            for weight, activation, _ in (setting.bits for setting in SINGLE_SWEEPS)
        ]
    )


PARTS = ("weights:down", "inputs:attention_input", "inputs:mlp_hidden", "keys")


def where_few_bits_hurt(layers: int, channels: int, harm: float) -> dict[str, xr.Dataset]:
    """What ``osp-diag advise`` measures: inputs of the down projection cost most, in the middle layer."""
    common = {"setting": "4-4-4", "method": "rtn", "convention": "plain", "tokens": 69}
    common |= {"token_source": "made-up text", "token_fingerprint": "made-up tokens"}
    layer = np.arange(layers)
    cost = np.outer([0.001, 0.01, 0.1, 0.0001], 1 / (1 + np.abs(layer - layers // 2))) * harm
    local = 0.01 * harm / (1 + np.abs(layer - layers // 2))
    accumulated = np.concatenate([[0.0], 0.8 * np.cumsum(local)[:-1]])
    kept = [0, 1, 2, 4]
    return {
        "sensitivity": xr.Dataset(
            {
                "divergence": (("part", "layer"), cost),
                "divergence_all_layers": ("part", 1.2 * cost.sum(1)),
            },
            {"part": list(PARTS), "layer": layer},
            common,
        ),
        "layer_errors": xr.Dataset(
            {
                "relative_error": ("layer", 1.1 * (local + accumulated)),
                "local_error": ("layer", local),
                "accumulated_error": ("layer", accumulated),
                "interaction": ("layer", 0.1 * (local + accumulated)),
            },
            {"layer": layer},
            common,
        ),
        "spared_channels": xr.Dataset(
            {
                "divergence": ("channels", harm / (1.0 + np.array(kept))),
                "share": ("channels", np.array(kept) / channels),
            },
            {"channels": kept},
            common,
        ),
    }
