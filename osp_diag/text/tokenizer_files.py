"""Opening a tokenizer by itself: a directory, a tokenizer.json, a SentencePiece model, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osp_diag.errors import TokenError
from osp_diag.quiet import quietly
from osp_diag.text.panics import no_panic

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

__all__ = ["END_OF_TEXT", "SentencePieceTokenizer", "fast_tokenizer", "open_tokenizer"]

END_OF_TEXT = "<|endoftext|>"

END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "[SEP]")
BEGIN_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "[CLS]")
"""What ends and begins a text in tokenizers that come as a bare ``tokenizer.json``, which does not say."""

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
SAMPLE = "The ferry leaves at 9, and (so far) nobody's here."
"""What a converted SentencePiece model has to read as the model itself does."""


def open_tokenizer(name: str | Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The tokenizer of that name.

    Parameters
    ----------
    name
        A directory, a ``tokenizer.json``, a SentencePiece ``.model``, or a hub id.
    trust_remote_code
        Run code that comes with the tokenizer.
    options
        Of ``AutoTokenizer.from_pretrained``.

    Raises
    ------
    TokenError
        There is none, it cannot be read, or the hub cannot be reached.
    """
    text, path = str(name), Path(name).expanduser()
    if path.is_file():
        return _from_sentencepiece(path) if path.suffix == ".model" else _from_file(path)
    if not path.is_dir():
        if path.is_absolute() or text.startswith((".", "~")) or path.suffix in (".json", ".model"):
            raise TokenError(f"there is no tokenizer at {text}: no such file or directory")
        return _automatic(text, trust_remote_code, options)
    if (path / "tokenizer.json").is_file() and not (path / "tokenizer_config.json").is_file():
        return _from_file(path / "tokenizer.json")
    model = next((path / file for file in SENTENCEPIECE_FILES if (path / file).is_file()), None)
    if model is None or (path / "tokenizer.json").is_file():
        return _automatic(str(path), trust_remote_code, options)
    original = _from_sentencepiece(model)
    if (path / "tokenizer_config.json").is_file():
        return _automatic(str(path), trust_remote_code, options)
    try:
        converted = _automatic(str(path), trust_remote_code, options)
    except TokenError:
        return original
    # Without what says how to read it, a conversion may read blanks in another way.
    return converted if _reads_alike(converted, original) else original


class SentencePieceTokenizer:
    """A SentencePiece model as it is: ids and texts, and no special tokens around them."""

    def __init__(self, processor: SentencePieceProcessor) -> None:
        self._processor = processor
        begin, end = processor.bos_id(), processor.eos_id()
        self.bos_token_id: int | None = begin if begin >= 0 else None
        self.eos_token_id: int | None = end if end >= 0 else None
        self.all_special_ids = [number for number in range(len(self)) if processor.is_control(number)]

    def __len__(self) -> int:
        return int(self._processor.get_piece_size())

    def get_vocab(self) -> dict[str, int]:
        """Piece → id."""
        return {self._processor.id_to_piece(number): number for number in range(len(self))}

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return list(self._processor.encode(text))

    def decode(self, ids: list[int]) -> str:
        """What ids read as, blanks at the beginning included."""
        return "".join(self._processor.id_to_piece(number) for number in ids).replace("▁", " ")


def _from_sentencepiece(path: Path) -> SentencePieceTokenizer:
    try:
        from sentencepiece import SentencePieceProcessor
    except ModuleNotFoundError as error:
        raise TokenError(
            f"{path} is a SentencePiece model, which needs the package sentencepiece: "
            "pip install sentencepiece"
        ) from error
    try:
        return SentencePieceTokenizer(SentencePieceProcessor(model_file=str(path)))
    except (RuntimeError, OSError, ValueError) as error:
        with path.open("rb") as file:
            ranks = re.match(rb"[A-Za-z0-9+/]+=* \d+\s", file.read(256))
        what = (
            "a vocabulary of tiktoken, which does not say how text is split; give the tokenizer.json of "
            "the model's Hugging Face files"
            if ranks
            else f"no SentencePiece model: {_first_line(error)}"
        )
        raise TokenError(f"{path} is {what}") from error


def _reads_alike(tokenizer: Any, original: SentencePieceTokenizer) -> bool:
    return list(tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]) == original.encode(SAMPLE)


def _automatic(location: str, trust_remote_code: bool, options: dict[str, Any]) -> Any:
    import transformers

    try:
        with quietly(), no_panic():
            return transformers.AutoTokenizer.from_pretrained(
                location, trust_remote_code=trust_remote_code, **options
            )
    except Exception as error:
        advice = (
            ""
            if Path(location).is_dir()
            else ". Check the hub id and the connection; without a network give a directory or tokenizer.json"
        )
        raise TokenError(
            f"the tokenizer of {location} cannot be opened: {type(error).__name__}: "
            f"{_first_line(error)}{advice}"
        ) from error


def _from_file(path: Path) -> Any:
    try:
        content = path.read_text("utf-8")
        from tokenizers import Tokenizer

        with no_panic():
            vocabulary = Tokenizer.from_str(content).get_vocab()
    except Exception as error:
        raise TokenError(
            f"{path} is not a tokenizer of the library tokenizers: {_first_line(error)}; give its "
            "tokenizer.json"
        ) from error
    end = next((token for token in END_NAMES if token in vocabulary), None)
    begin = next((token for token in BEGIN_NAMES if token in vocabulary), end)
    return fast_tokenizer(content, begin, end)


def fast_tokenizer(content: str, begin: str | None, end: str | None) -> Any:
    """A tokenizer from the text of a ``tokenizer.json``, and its BOS and end of text."""
    import transformers
    from tokenizers import Tokenizer

    names = {key: token for key, token in (("bos_token", begin), ("eos_token", end)) if token is not None}
    with quietly():
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(content), clean_up_tokenization_spaces=False, **names
        )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
