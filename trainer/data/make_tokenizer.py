"""Makes the tokenizer that comes along: ``python -m osp_diag.trainer.data.make_tokenizer [FILE]``.

A byte-level BPE, trained on the built-in text, with ``<|endoftext|>`` as id 0. That is all of the text, also
what training holds out. The same text and release of the library ``tokenizers`` make the same file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from osp_diag.trainer.data.sources import builtin_documents
from osp_diag.trainer.data.tokenizing import BUILTIN_FILE, END_OF_TEXT

__all__ = ["make_tokenizer"]

ENTRIES = 4096


def make_tokenizer() -> Tokenizer:
    """Train it: a few seconds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in builtin_documents()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return tokenizer


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name(BUILTIN_FILE)
    make_tokenizer().save(str(out), pretty=False)
    print(f"{out}: {out.stat().st_size:,} bytes")
