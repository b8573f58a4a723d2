"""The embedded base's tokenizer: byte-level BPE, so that any text can be written; trained on procedural text alone."""

from __future__ import annotations

import string

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.embedded.scenes import KINDS, ask, draw_scene

VOCABULARY = 640
"""Tokens in all: 256 bytes, 4 special tokens, and merges of frequent words."""

IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }} "
    "{% else %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_COMMON_WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not what all "
    "were we when your can said there use an each which she do how their if will up other about out many then them these so some "
    "her would make like him into time has look two more write go see number no way could people my than first water been call "
    "who oil its now find long down day did get come made may part kind shown answer question image picture object color colour "
    "yes left right top bottom small large big first second third true false none read repeat text letter animal flower plant "
    "food house tree street person man woman child car dog cat bird sky ground day night front behind above below between"
).split()


def procedural_text(rng: np.random.Generator, scenes: int) -> list[str]:
    """Questions and answers about `scenes` random scenes, and common English words."""
    lines = [" " + word for word in _COMMON_WORDS for _ in range(scenes // 50)]
    for _ in range(scenes):
        scene = draw_scene(rng)
        for kind in KINDS:
            pair = ask(scene, kind, rng)
            if pair is not None:
                lines += [f" USER: <image>\n{pair.question} ASSISTANT: {pair.answer}"]
    return lines


def random_words(rng: np.random.Generator) -> str:
    """A phrase to repeat: common words, random letters, digits, capitals, now and then any printable character."""
    words = []
    for _ in range(int(rng.integers(1, 4))):
        form = rng.random()
        if form < 0.4:
            word = str(rng.choice(_COMMON_WORDS))
        else:
            letters = string.ascii_letters + string.digits if form < 0.8 else string.printable[:94]
            word = "".join(rng.choice(list(letters), size=int(rng.integers(1, 9))))
        words.append(word.capitalize() if rng.random() < 0.2 else word)
    return " ".join(words)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer on procedural text; deterministic for a seed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", IMAGE_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(procedural_text(np.random.default_rng(seed), 1500), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
