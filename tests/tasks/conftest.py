"""Tiny tokenizers, trained on the templates in memory: one a kind of offset."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from neuroplast.tasks import agreement, ioi, pronouns


def world() -> list[str]:
    templates = [
        pattern.format(first="Mary", second="John", giver="Mary", place="store", object="ring")
        for pattern in ioi.TEMPLATES.values()
    ]
    return templates + [f"a {word}" for word in (*ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS)]


def byte_level(trim_offsets: bool, texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=4000, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def whole_words(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", "[PAD]"], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


@pytest.fixture(scope="session")
def spaced() -> PreTrainedTokenizerFast:
    """Like GPT-2: a token owns its leading space, and its offsets hold it."""
    return byte_level(False, world())


@pytest.fixture(scope="session", params=["spaced", "trimmed", "words"])
def tokenizer(request: pytest.FixtureRequest, spaced: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Offsets with the leading space, offsets without it, and tokens that have none; the last has no BOS."""
    others = {"trimmed": lambda: byte_level(True, world()), "words": lambda: whole_words(world())}
    return spaced if request.param == "spaced" else others[request.param]()


@pytest.fixture(scope="session")
def letters() -> PreTrainedTokenizerFast:
    """Knows single bytes only, so every word is several tokens."""
    return byte_level(False, [])


@pytest.fixture(scope="session")
def few_names() -> PreTrainedTokenizerFast:
    """Knows whole words, but only five of the names."""
    known = [text for text in world() if text[2:] not in ioi.NAMES[5:]]
    return whole_words([text.replace("Mary", "Aaron").replace("John", "Adam") for text in known])


@pytest.fixture(scope="session")
def wordy() -> PreTrainedTokenizerFast:
    """Knows every word of the tasks that are written from lists of words."""
    texts = [pattern for pattern, _ in agreement.TEMPLATES.values()] + list(pronouns.TEMPLATES.values())
    texts += [" ".join(words) for _, words in agreement.TEMPLATES.values()] + [
        " ".join(pair) for pair in agreement.NOUNS
    ]
    return whole_words([*texts, *pronouns.FEMALE, *pronouns.MALE, *pronouns.PRONOUNS])
