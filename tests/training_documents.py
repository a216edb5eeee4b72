"""Documents for the tests of training data: numbered ones, and files of texts of every kind."""

from __future__ import annotations

import gzip
import json
import lzma
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from osp_diag.trainer.config import DataConfig
from osp_diag.trainer.data import TrainingData, open_data

VOCABULARY = 100_000
TEXTS = [f"The {n}th of many documents, each of which has so many words as this one has." for n in range(12)]


def numbered(lengths: Sequence[int]) -> list[list[int]]:
    """Documents in which every token is another one, counted from 1."""
    firsts = np.cumsum([0, *lengths]) + 1
    return [list(range(first, first + length)) for first, length in zip(firsts, lengths, strict=False)]


def open_documents(documents: list[list[int]], batch_size: int = 1, **changes) -> TrainingData:
    """All of ``documents`` as training data, each ended by 0; something else is held out."""
    options = {key: changes.pop(key) for key in ("rank", "ranks") if key in changes}
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/train.npy", np.asarray([t for d in documents for t in [*d, 0]], dtype=np.uint32))
        np.save(f"{folder}/other.npy", np.arange(90_000, 90_064, dtype=np.uint32))
        config = DataConfig(
            source="tokens", path=f"{folder}/train.npy", validation_path=f"{folder}/other.npy", **changes
        )
        return open_data(config, batch_size=batch_size, vocabulary_size=VOCABULARY, **options)


def rows_of(data: TrainingData, count: int) -> list[tuple[list[int], list[int], list[int] | None]]:
    rows = []
    for _ in range(count):
        batch = data.next_batch()
        for row in range(len(batch)):
            documents = None if batch.document_ids is None else batch.document_ids[row].tolist()
            rows.append((batch.input_ids[row].tolist(), batch.labels[row].tolist(), documents))
    return rows


def write_texts(folder: Path, kind: str) -> dict[str, str]:
    """The same documents as files of one kind; what of the configuration reads them."""
    rows = "".join(json.dumps({"id": n, "story": text, "note": "x"}) + "\n" for n, text in enumerate(TEXTS))
    column = {"text_column": "story"}
    if kind == "text":
        for number, text in enumerate(TEXTS):
            (folder / f"{number:02}.txt").write_text(text)
        return {"source": "text", "path": str(folder)}
    if kind == "separated":
        (folder / "all.txt.gz").write_bytes(gzip.compress("\n<|endoftext|>\n".join(TEXTS).encode()))
        return {"source": "text", "path": str(folder / "*.gz")}
    if kind in ("jsonl", "jsonl.gz", "jsonl.xz"):
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.xz": lzma.compress}[kind]
        (folder / f"rows.{kind}").write_bytes(pack(rows.encode()))
        return {"source": "jsonl", "path": str(folder), **column}
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(TEXTS))), "story": TEXTS, "note": ["x"] * len(TEXTS)})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=5)
    return {"source": "parquet", "path": str(folder / "rows.parquet"), **column}


def word_tokenizer(folder: Path, *, config: bool) -> Path:
    words = ["<unk>", "<s>", "</s>", *"abcdefgh"]
    bare = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(exist_ok=True)
    bare.save(str(folder / "tokenizer.json"))
    if config:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
