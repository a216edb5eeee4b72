"""Ways in which files are damaged or made to do harm: for property tests and ``benchmarks/hostile.py``."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from osp_diag.errors import OspDiagError

__all__ = [
    "HOSTILE_VALUES",
    "Written",
    "damage_bytes",
    "damage_json",
    "gguf_file",
    "refusal",
    "replace_by_special",
]


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    """What our error says that the function raises; empty if it raises nothing. Other errors go on."""
    try:
        function(*arguments)
    except OspDiagError as error:
        return str(error)
    return ""


class Written(str):
    """JSON text that :func:`json.dumps` would not write."""


HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 10**6, 10**8, 2**31, 2**63, -(2**40), 0.5, 1e308, "", "x", "../../etc/passwd",
    "\x1b]0;title\x07\x1b[2J", "a" * 100_000, [], {}, [[]], {"a": {"a": 1}}, ["x"] * 3, [10**9, 10**9],
    Written("9" * 5000), Written("NaN"), Written("-Infinity"), Written("[" * 3000 + "]" * 3000),
    Written('{"a":' * 3000 + "1" + "}" * 3000), Written("[" * 100_000), Written('"\\ud800"'),
    Written('"\\u0000"'),
)  # fmt: skip
"""What stands in place of an entry of a JSON file."""


def damage_bytes(data: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, put in or taken out, or the end cut off."""
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 5, 20])):
        place, kind = dice.randrange(len(changed) + 1), dice.randrange(6)
        if kind == 0 and changed:
            changed[place % len(changed)] = dice.randrange(256)
        elif kind == 1 and changed:
            changed[place % len(changed)] ^= 1 << dice.randrange(8)
        elif kind == 2:
            changed[place:place] = dice.randbytes(dice.choice([1, 4, 100]))
        elif kind == 3:
            del changed[place : place + dice.choice([1, 8, 100])]
        elif kind == 4:
            changed[place : place + 8] = dice.choice([b"\xff" * 8, bytes(8), b"\x00\x00\x00\x80" * 2])
        else:
            changed = changed[:place]
    return bytes(changed)


def damage_json(text: str, dice: random.Random) -> str:
    """One entry of a JSON object replaced, removed, or put beside itself under another name."""
    value = json.loads(text)
    container, key = dice.choice(list(_places(value)))
    kind = dice.random()
    if kind < 0.1:
        del container[key]
    elif kind < 0.15 and isinstance(container, dict):
        container[dice.choice(["", "../x", "/", "\x1b[2J", "__class__"])] = container[key]
    else:
        container[key] = dice.choice(HOSTILE_VALUES)
    written: list[str] = []

    def plain(entry: Any) -> Any:
        if isinstance(entry, Written):
            written.append(str(entry))
            return f"\ue000{len(written) - 1}\ue000"
        if isinstance(entry, dict):
            return {name: plain(item) for name, item in entry.items()}
        return [plain(item) for item in entry] if isinstance(entry, list) else entry

    result = json.dumps(plain(value), ensure_ascii=False)
    for number, entry in enumerate(written):
        result = result.replace(f'"\ue000{number}\ue000"', entry)
    return result


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) within a JSON value; of long lists and vocabularies a few."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    for key in keys if len(keys) < 40 else keys[:5] + keys[-5:]:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def replace_by_special(path: Path, dice: random.Random) -> None:
    """Put a pipe, a folder, or a link to a device, to itself or to nothing, in the place of a file."""
    path.unlink()
    kind = dice.randrange(5)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    else:
        os.symlink(("/dev/zero", path, "/nowhere/at/all")[kind - 2], path)


def gguf_file(path: Path) -> Path:
    """A Llama of one block and 16 channels with a tokenizer of 260 tokens, as llama.cpp keeps models."""
    import gguf
    import numpy as np

    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(260)
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, "\u2581"])
    writer.add_token_scores([0.0] * 260)
    writer.add_token_types([2, 3, 3, *[6] * 256, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {
        "token_embd.weight": (260, 16), "output_norm.weight": (16,), "output.weight": (260, 16),
        "blk.0.attn_norm.weight": (16,), "blk.0.ffn_norm.weight": (16,), "blk.0.attn_q.weight": (16, 16),
        "blk.0.attn_k.weight": (16, 16), "blk.0.attn_v.weight": (16, 16),
        "blk.0.attn_output.weight": (16, 16),
        "blk.0.ffn_gate.weight": (24, 16), "blk.0.ffn_up.weight": (24, 16), "blk.0.ffn_down.weight": (16, 24),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(name, draw.standard_normal(shape).astype(np.float32) * 0.1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
