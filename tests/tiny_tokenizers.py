"""Tokenizers of several kinds, made on the spot."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Ana has 12 pens and buys 34 more. How many pens does Ana have now?\n12 + 34 = 46.\n#### 46",
    "Ben sells 5 of 60 eggs for $7 each.\n60 - 5 = 55.\n#### -55 1/2",
    "<|user|>\nWhy, or 89?<|end|>\n<|assistant|>\nYes.<|end|>\n",
]
END = "</s>"


def trained(tokenizer: Tokenizer, alphabet: list[str] | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a vocabulary of a few words."""
    names = ["<unk>", END, *special.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, initial_alphabet=alphabet or [], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token="<unk>", **special)


def byte_level(**special: str) -> PreTrainedTokenizerFast:
    """All bytes; digits singly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, pre_tokenizers.ByteLevel.alphabet(), **special)


def without_decoder() -> PreTrainedTokenizerFast:
    """One that writes its tokens side by side with spaces between them."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.decoder = None
    return tokenizer


def pieces(*, line_breaks: bool) -> PreTrainedTokenizerFast:
    """Like SentencePiece: a space belongs to the word after it, and line breaks are spaces, or belong to it too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if line_breaks:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\s*\S+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        return trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())
    tokenizer.normalizer = normalizers.Replace("\n", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return trained(tokenizer)
