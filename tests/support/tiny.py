"""A tokenizer small enough to train in a test: byte-level BPE, BOS in front, a chat template that writes BOS too."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_TEXT = (
    "the cat sat on the mat and the dog sat on the cat",
    "what is one and one? one and one is two",
    "name a colour of the sky. the colour of the sky is blue",
    "12 + 13 = 25, 22 + 31 = 53",
)


def tiny_tokenizer_dir(path: Path, *, chat_template: str | None = CHAT_TEMPLATE, bos: bool = True) -> Path:
    """Writes tokenizer.json and tokenizer_config.json; any text has tokens, and BOS is 0, EOS 1.

    Args:
        path: directory, made where absent.
        chat_template: None for a base model's tokenizer.
        bos: whether the tokenizer puts BOS in front of a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
