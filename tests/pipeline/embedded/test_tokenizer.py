"""The tokenizer takes any text and gives it back; its chat template; what is drawn to train both."""

from __future__ import annotations

import collections
import string

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.embedded.build import base_processor
from pipeline.embedded.tokenizer import IMAGE_TOKEN, VOCABULARY, procedural_text, random_words, train_tokenizer
from pipeline.models import EMBEDDED_BASE

SPECIAL = ["<pad>", "<s>", "</s>", IMAGE_TOKEN]
TEXTS = [
    "what color is the circle?",
    "",
    " ",
    "  two  spaces, one at the end ",
    "line\nbreak\r\nand\ttab",
    "\x00\x01\x1b\x7f\x85",
    "naïve café, Größe, čeština",
    "日本語 العربية हिन्दी ไทย",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u202e\u2066\ufeff\ufffd",
    "e\u0301 is not \u00e9",
    "</s>",
    "a<image>b<pad>c<s>",
    "</s></s> <image> \n<image>",
    "<imag",
    "Ġ Ċ ĉ",
    "'s 't don't I'LL 12345 3.14",
    "x" * 3000,
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(0)


def random_texts(count: int) -> list[str]:
    """Any code points but the surrogates, which no file can hold; every plane, short and long."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(count):
        top = int(rng.choice([0x7F, 0x7FF, 0xFFFF, 0x10FFFF]))
        points = rng.integers(0, top + 1, size=int(rng.integers(1, 40)))
        texts.append("".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF))
    return texts


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:24]))
def test_any_text_comes_back(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_random_text_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = random_texts(400)
    assert len("".join(texts)) > 4000
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.decode(ids) == text
        assert all(0 <= index < VOCABULARY for index in ids)


def test_special_tokens_in_text_can_stay_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """As ByeSight encodes what was submitted; read as control they would be one token each."""
    text = "".join(SPECIAL)
    assert tokenizer(text)["input_ids"] == tokenizer.convert_tokens_to_ids(SPECIAL)
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert not set(ids) & set(tokenizer.convert_tokens_to_ids(SPECIAL))
    assert tokenizer.decode(ids) == text


def test_the_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == [0, 1, 2, 3]
    assert sorted(tokenizer.all_special_tokens) == sorted(SPECIAL)
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
    assert tokenizer.padding_side == "left"
    assert tokenizer.image_token == IMAGE_TOKEN
    assert tokenizer("plain")["input_ids"][0] != tokenizer.bos_token_id, "nothing is put before a text"
    for word in (" the", " circle", " red", " yes", " USER", " ASSISTANT"):
        assert len(tokenizer(word)["input_ids"]) == 1, word
    assert all(len(tokenizer(bytes([byte]).decode("latin-1"))["input_ids"]) <= 2 for byte in range(256))


def test_the_shipped_tokenizer_is_the_one_that_is_trained_here(tokenizer: PreTrainedTokenizerFast) -> None:
    shipped = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    assert tokenizer.get_vocab() == shipped.get_vocab()
    assert tokenizer.backend_tokenizer.to_str() == shipped.backend_tokenizer.to_str()


SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?\nhere"}]}
ANSWERED = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
LATE = {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "image"}, {"type": "text", "text": "this?"}]}
PAIR = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "same?"}]}
CHATS = {
    "a question": ([ASKED], "USER: <image>\nwhat?\nhere "),
    "with its answer": ([ASKED, ANSWERED], "USER: <image>\nwhat?\nhere ASSISTANT: a cat</s>"),
    "two turns": ([ASKED, ANSWERED, LATE], "USER: <image>\nwhat?\nhere ASSISTANT: a cat</s>USER: <image>\nand this? "),
    "two pictures": ([PAIR], "USER: <image>\n<image>\nsame? "),
    "system": ([SYSTEM, ASKED], "Be brief. USER: <image>\nwhat?\nhere "),
    "plain strings": (
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "q {{ x }}"},
            {"role": "assistant", "content": "a"},
        ],
        "S USER: q {{ x }} ASSISTANT: a</s>",
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_the_chat_template(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    messages, text = CHATS[name]
    processor = base_processor(tokenizer)
    assert processor.apply_chat_template(messages) == text
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == text + "ASSISTANT:"


def test_procedural_text_holds_every_kind_of_question() -> None:
    lines = procedural_text(np.random.default_rng(0), 100)
    asked = [line for line in lines if line.startswith(" USER: <image>\n")]
    words = collections.Counter(line for line in lines if line not in asked)
    assert lines == procedural_text(np.random.default_rng(0), 100)
    assert all(" ASSISTANT: " in line for line in asked)
    assert words[" the"] == words[" picture"] == 2, "two of each for a hundred scenes"
    text = " ".join(asked)
    assert all(word in text for word in ("what color", "what shape", "how many", "where is", "is there", "describe"))


def test_words_to_repeat_are_of_all_printable_characters() -> None:
    rng = np.random.default_rng(0)
    phrases = [random_words(rng) for _ in range(800)]
    assert {len(phrase.split(" ")) for phrase in phrases} == {1, 2, 3}
    assert all(phrase == phrase.strip() and phrase for phrase in phrases)
    seen = set("".join(phrases))
    assert seen == set(string.digits + string.ascii_letters + string.punctuation + " ")
    assert max(len(word) for phrase in phrases for word in phrase.split(" ")) <= 10
