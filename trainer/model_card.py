"""The model card of an exported checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from osp_diag.trainer.config import ModelConfig

__all__ = ["model_card"]

FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- outlier-safe-pre-training
---
"""

LOADING = """Loads in plain `transformers`:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("…")
```"""


def model_card(name: str, config: ModelConfig, card: Mapping[str, Any], folded: Sequence[str]) -> str:
    """Markdown for ``README.md``.

    Parameters
    ----------
    name : of the model
    config : of the training model
    card : ``recipe``, ``steps``, ``tokens``, ``training_data``, ``config`` (every value by dotted key) and
        ``statistics`` (name → number), each as far as known; what else it holds is listed as well
    folded : what the export did to the weights
    """
    facts = dict(card)
    configuration, statistics = facts.pop("config", {}), facts.pop("statistics", {})
    parts = [
        FRONT + f"# {name}",
        LOADING,
        "## Training",
        "\n".join(
            f"- {label.replace('_', ' ')}: {_as_text(value)}" for label, value in _facts(config, facts)
        ),
    ]
    if statistics:
        rows = [f"| {label} | {_as_text(value)} |" for label, value in statistics.items()]
        parts += ["## Final statistics", "\n".join(["| statistic | value |", "|---|---|", *rows])]
    if folded:
        parts += ["## What the export changed", "\n".join(f"- {sentence}" for sentence in folded)]
    if configuration:
        text = json.dumps(configuration, indent=2, ensure_ascii=False, default=str)
        parts += ["## Configuration", f"```json\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def _facts(config: ModelConfig, facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    lines = [(label, value) for label, value in facts.items() if value not in ("", None)]
    return [*lines, ("norm", config.norm), ("embedding_projection", config.embedding_projection)]


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
