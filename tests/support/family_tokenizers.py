"""Stand-ins for the gated tokenizers: the same special tokens, BOS rule and chat template; words of their own."""

import json
from pathlib import Path

from make_renderings import CASES, LLAMA2, PHI3
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxcrit.data.tokenizer import load_tokenizer

SPECIAL = {
    "llama2": ("<unk>", "<s>", "</s>"),
    "llama3": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
    ),
    "phi3": ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
}
BOS = {"llama2": "<s>", "llama3": "<|begin_of_text|>", "phi3": "<s>"}
EOS = {"llama2": "</s>", "llama3": "<|eot_id|>", "phi3": "<|endoftext|>"}
CHAT = {
    "llama2": "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' +"
    " m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "phi3": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
}
_TEXT = [*map(json.dumps, CASES), *(prompt + target for prompt, target in LLAMA2), *(one[1] + one[2] for one in PHI3)]


def family_tokenizer(path: Path, family: str, *, strip: bool = True, chat: bool = True):
    """A loaded stand-in.

    Args:
        path: directory to write it to.
        family: llama2, llama3 or phi3.
        strip: Phi-3's special tokens eat the white space to their right, as the published ones do.
        chat: with the family's chat template.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=None if family == "llama3" else "<unk>"))
    if family == "llama3":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:  # as sentencepiece does: a space in front of a text, spaces as ▁
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        # The published vocabularies have no token that goes on after a space or over a line break.
        splits = [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split("\n", "isolated")]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
        )
        alphabet = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    eats = SPECIAL["phi3"][4:] if strip and family == "phi3" else ()
    added = [AddedToken(t, rstrip=t in eats, normalized=False, special=True) for t in SPECIAL[family]]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=added, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    if family != "phi3":  # Phi-3's tokenizer, as now published, puts no BOS in front
        bos = BOS[family]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS[family], "eos_token": EOS[family]}
    config |= {"chat_template": CHAT[family]} if chat else {}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(path)
