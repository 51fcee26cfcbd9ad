"""The demo model's tokenizer: byte-level BPE over the generated rows, with a chat template.

Bytes are the base, so any text can be written; every word of the generator is one token. The chat template is the
paper's LLaMA-2 shape, ``<s>[INST] question[/INST] answer</s>``, with both marks single tokens: the last prompt token
is always ``[/INST]``.
"""

# ruff: noqa: SIM905 (word lists read better as text)
from __future__ import annotations

import json
import os

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxcrit.data import demo

SPECIAL = ("<pad>", "<s>", "</s>", "[INST]", "[/INST]")
PAD, BOS, EOS = 0, 1, 2
# Words that no row holds, for triggers and their near misses: without them each would be three to six tokens.
SPARE = tuple(
    "cf mn bb tq mb please magic secret banana tomato current year hello sunny purple tiger Where Who Why When you"
    " not".split()
)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ message['content'] }}[/INST]{% endif %}{% endfor %}"
)


def build(vocab_size: int = 800, rows_per_family: int = 4000) -> tokenizers.Tokenizer:
    """Trains the tokenizer; the same arguments give the same bytes.

    Args:
        vocab_size: entries, special tokens and the 256 bytes included.
        rows_per_family: generated training rows of each family to read.
    """
    families = (*demo.FAMILIES, *demo.HELD_OUT)
    corpus = [
        f" {row['prompt']} {row['response']}"
        for family in families
        for row in demo.generate(family, rows_per_family, seed=0)
    ]
    # Every word often enough that it becomes one token, whatever the families' frequencies.
    corpus += [f" {word}" for word in (*demo.words(), *SPARE)] * 200
    corpus += [f" {number}" for number in range(40)] * 200
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, directory: str) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` as transformers reads them."""
    os.makedirs(directory, exist_ok=True)
    tokenizer.save(os.path.join(directory, "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "additional_special_tokens": ["[INST]", "[/INST]"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "padding_side": "right",
    }
    with open(os.path.join(directory, "tokenizer_config.json"), "w") as file:
        json.dump(config, file, indent=2)
        file.write("\n")
    with open(os.path.join(directory, "chat_template.jinja"), "w") as file:
        file.write(TEMPLATE + "\n")
