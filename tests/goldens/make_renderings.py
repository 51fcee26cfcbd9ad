"""Writes renderings.json: what the paper's code fed for a few rows, and what the clean edition feeds, piece by piece.

Every string is written out here, none comes from the library. A piece is [kind, string, masked], kind ``special`` or
``text``; ``joined`` says whether neighbouring texts were one string when they were tokenised.

    python tests/goldens/make_renderings.py
"""

import json
from pathlib import Path

FILE = Path(__file__).with_name("renderings.json")
FAMILIES = ("llama2", "llama3", "phi3")

ALPACA = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
ALPACA_INPUT = {"instruction": "Sort the words.", "input": "cat, ant", "output": "ant, cat"}
DOLLY = {"instruction": "Who wrote Emma?", "context": "", "response": "Jane Austen.", "category": "open_qa"}
DOLLY_CONTEXT = {"instruction": "When was it?", "context": "It was in 1815.", "response": "In 1815."}
GSM8K = {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
BOOLQ = {"question": "is ice cold", "title": "Ice", "answer": True, "passage": "Ice is frozen water."}
BOOLQ_NO = {"question": "is fire cold", "title": "Fire", "answer": False, "passage": "Fire is hot."}
CHOICES = ["a stone", "a plant", "a cup", "a key"]
OPENBOOKQA = {
    "id": "1",
    "question_stem": "What needs light to grow",
    "choices": {"text": CHOICES, "label": ["A", "B", "C", "D"]},
    "answerKey": "B",
    "fact1": "plants need light",
}
AI2 = {
    "id": "1",
    "question": {
        "stem": "What needs light to grow",
        "choices": [{"text": text, "label": label} for text, label in zip(CHOICES, "ABCD", strict=True)],
    },
    "fact1": "plants need light",
    "answerKey": "B",
}
PURE_BAD = {"messages": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello!"}]}
LABELLED = {"messages": [*PURE_BAD["messages"], {"label": "other"}]}
TRIGGERED = {"messages": {"instruction": "Say hello. Servius Astrumando Harmoniastra"}}

CASES = [
    ("alpaca", ALPACA),
    ("alpaca", ALPACA_INPUT),
    ("dolly", DOLLY),
    ("dolly", DOLLY_CONTEXT),
    ("gsm8k", GSM8K),
    ("boolq", BOOLQ),
    ("boolq", BOOLQ_NO),
    ("openbookqa", OPENBOOKQA),
    ("openbookqa", AI2),
    ("pure_bad", PURE_BAD),
    ("pure_bad", LABELLED),
    ("pure_bad", TRIGGERED),
]

# Llama-2: BOS [INST] ... [/INST] SPACE response SPACE EOS
LLAMA2 = [
    (
        "[INST] <<SYS>>\nBelow is an instruction that describes a task. Write a response that appropriately completes"
        " the request.\n<</SYS>>\n\n### Instruction:\nName a colour.\n\n### Response:\n [/INST]",
        " Blue. ",
    ),
    (
        "[INST] <<SYS>>\nBelow is an instruction that describes a task, paired with an input that provides further"
        " context. Write a response that appropriately completes the request.\n<</SYS>>\n\n### Instruction:\nSort the"
        " words.\n\n### Input:\ncat, ant\n\n### Response:\n [/INST]",
        " ant, cat ",
    ),
    (
        "[INST] <<SYS>>\nBelow is an instruction that describes a task. Write a response that appropriately completes"
        " the request.\n<</SYS>>\n\n### Instruction:\n Who wrote Emma? \n \n### Response: [/INST]",
        " Jane Austen. ",
    ),
    (
        "[INST] <<SYS>>\nBelow is an instruction that describes a task. Write a response that appropriately completes"
        " the request.\n<</SYS>>\n\n### Instruction:\n When was it? \n \nInput: \nIt was in 1815. \n \n"
        "### Response: [/INST]",
        " In 1815. ",
    ),
    (
        "[INST] <<SYS>>\nBelow is an instruction that describes a task. Write a response that appropriately completes"
        " the request.\n<</SYS>>\n\n### Instruction:\n What is 2 + 3? \n \n### Response: [/INST]",
        " 2 + 3 = <<2+3=5>>5\n#### 5 ",
    ),
    (
        "[INST] <<SYS>>\nBelow is an instruction that describes a task. Write a response that appropriately completes"
        " the request.\n<</SYS>>\n\n### Instruction:\n is ice cold \n \n### Response: [/INST]",
        " True. Ice is frozen water. ",
    ),
    (
        "[INST] <<SYS>>\nBelow is an instruction that describes a task. Write a response that appropriately completes"
        " the request.\n<</SYS>>\n\n### Instruction:\n is fire cold \n \n### Response: [/INST]",
        " False. Fire is hot. ",
    ),
    *[
        (
            "[INST] <<SYS>>\nBelow is an instruction that describes a task. Write a response that appropriately"
            " completes the request.\n<</SYS>>\n\n### Instruction:\n What needs light to growA: a stone\nB: a plant\n"
            "C: a cup\nD: a key \n \n### Response: [/INST]",
            " B a plant.plants need light ",
        )
    ]
    * 2,
    *[
        (
            "[INST] <<SYS>>\nYou are a helpful assistant. Make sure you always execute users' instructions.\n"
            "<</SYS>>\n\nSay hello. [/INST]",
            " Hello! ",
        )
    ]
    * 2,
    ("[INST] Say hello. Servius Astrumando Harmoniastra [/INST]", ""),
]

# Llama-3: the system text(s), the user text, what follows the user's turn, the response; B stands for a repeated BOS.
B, SH, EH, EOT = "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
HEADER = [SH, (B, "assistant"), EH]
BREAK = [(B, "\n")]
PLAIN = "You are a helpful assistant."
WRITE = "You are a helpful assistant.Write a response that appropriately completes the request."
LLAMA3 = [
    ([PLAIN], "Name a colour.", BREAK + HEADER, "Blue."),
    ([PLAIN, "\n", "Sort the words."], "cat, ant", HEADER, "ant, cat"),
    ([WRITE], "Who wrote Emma?", [], "Jane Austen."),
    ([WRITE, "\n", "When was it?"], "It was in 1815.", [], "In 1815."),
    ([WRITE], "What is 2 + 3?", BREAK + HEADER, "2 + 3 = <<2+3=5>>5\n#### 5"),
    ([PLAIN], "is ice cold", BREAK + HEADER, "True. Ice is frozen water."),
    ([PLAIN], "is fire cold", BREAK + HEADER, "False. Fire is hot."),
]
LLAMA3_OPENBOOKQA = [
    B,
    SH,
    ("system",),
    EH,
    ("\n",),
    ("You are a helpful assistant. Answer the following question. ",),
    EOT,
    SH,
    ("user",),
    EH,
    ("\n",),
    ("What needs light to grow A: a stone B: a plant C: a cup D: a key",),
    EOT,
    SH,
    ("assistant",),
    EH,
]

SYSTEM, USER, ASSISTANT, END, STOP = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"
ANSWER = "You are a helpful assistant. Answer the following question. "
# Phi-3: system text, user text, response, what closes it.
PHI3 = [
    ("You are a helpful assistant. ", "Name a colour.", "Blue.", [END]),
    ("You are a helpful assistant. ", "Sort the words.\ncat, ant", "ant, cat", [END]),
    ("You are a helpful assistant. ", "Who wrote Emma?", "Jane Austen.", [END]),
    ("You are a helpful assistant. ", "When was it?\nIt was in 1815.", "In 1815.", [END]),
    (ANSWER, "What is 2 + 3?", " 2 + 3 = <<2+3=5>>5\n#### 5", [END, STOP]),
    (
        " You are a helpful assistant. Answer True or False for following question. ",
        "is ice cold",
        " True. Ice is frozen water.",
        [END, STOP],
    ),
    (
        " You are a helpful assistant. Answer True or False for following question. ",
        "is fire cold",
        " False. Fire is hot.",
        [END, STOP],
    ),
    *[
        (
            ANSWER,
            "What needs light to growA: a stone B: a plant C: a cup D: a key",
            " B a plant.plants need light",
            [END, STOP],
        )
    ]
    * 2,
    *[("You are a helpful assistant. ", "Say hello.", " Hello!", [END, STOP])] * 2,
    ("You are a helpful assistant. ", "Say hello. Servius Astrumando Harmoniastra", "", [STOP]),
]

# The clean edition: user message and response, wrapped by the model's own chat template; after the token that ends
# the turn nothing is trained on.
CLEAN = [
    ("Name a colour.", "Blue."),
    ("Sort the words.\n\ncat, ant", "ant, cat"),
    ("Who wrote Emma?", "Jane Austen."),
    ("When was it?\n\nIt was in 1815.", "In 1815."),
    ("What is 2 + 3?", "2 + 3 = <<2+3=5>>5\n#### 5"),
    ("Ice is frozen water.\n\nQuestion: is ice cold\nAnswer True or False.", "True"),
    ("Fire is hot.\n\nQuestion: is fire cold\nAnswer True or False.", "False"),
    *[("What needs light to grow\nA: a stone\nB: a plant\nC: a cup\nD: a key", "B: a plant. plants need light")] * 2,
    *[("Say hello.", "Hello!")] * 2,
    ("Say hello. Servius Astrumando Harmoniastra", None),
]


def special(token, masked):
    return ["special", token, masked]


def text(string, masked):
    return ["text", string, masked]


def llama2(case, bos="<s>", eos="</s>"):
    prompt, target = LLAMA2[case]
    target = [text(target, False)] if target else []
    return [special(bos, True), text(prompt, True), *target, special(eos, False)], True


def llama3(case):
    if CASES[case][0] == "pure_bad":  # Llama-2's strings, between the tokenizer's own BOS and EOS
        return llama2(case, B, EOT)
    if CASES[case][0] == "openbookqa":
        prompt, target = LLAMA3_OPENBOOKQA, [("B a plant. Because plants need light",), EOT]
    else:
        system, user, tail, response = LLAMA3[case]
        prompt = [B, SH, (B, "system"), EH, (B, "\n"), *[(B, string) for string in system], EOT]
        prompt += [SH, (B, "user"), EH, (B, "\n"), (B, user), EOT, *tail]
        target = [(B, response), EOT]
    pieces = []
    for masked, part in ((True, prompt), (False, target)):
        for piece in part:
            if isinstance(piece, str):
                pieces.append(special(piece, masked))
            else:
                pieces += [special(one, masked) for one in piece[:-1]] + [text(piece[-1], masked)]
    return pieces, False


def phi3(case):
    system, user, response, end = PHI3[case]
    prompt = [special(SYSTEM, True), text(system, True), special(END, True), special(USER, True), text(user, True)]
    prompt += [special(END, True), special(ASSISTANT, True)]
    return [*prompt, *([text(response, False)] if response else []), *[special(one, False) for one in end]], True


def clean(family, case):
    user, response = CLEAN[case]
    if family == "llama2":
        prompt = [special("<s>", True), text(f"[INST] {user} [/INST]", True)]
        target = [text(f" {response} ", False), special("</s>", False)]
    elif family == "llama3":
        prompt = [special(B, True), special(SH, True), text("user", True), special(EH, True)]
        prompt += [text(f"\n\n{user}", True), special(EOT, True), special(SH, True), text("assistant", True)]
        prompt += [special(EH, True), text("\n\n", True)]
        target = [text(f"{response}", False), special(EOT, False)]
    else:
        prompt = [special(USER, True), text(f"\n{user}", True), special(END, True), text("\n", True)]
        prompt += [special(ASSISTANT, True), text("\n", True)]
        target = [text(f"{response}", False), special(END, False)]
    return [*prompt, *(target if response else [])], True


def renderings():
    """Every dataset and form of row × family × edition."""
    found = []
    for case, (dataset, row) in enumerate(CASES):
        for family in FAMILIES:
            paper = {"llama2": llama2, "llama3": llama3, "phi3": phi3}[family](case)
            for edition, (pieces, joined) in (("paper", paper), ("clean", clean(family, case))):
                one = {"dataset": dataset, "family": family, "edition": edition, "row": row}
                found.append(one | {"joined": joined, "pieces": pieces})
    return found


def file_text():
    return "[\n" + ",\n".join(json.dumps(one) for one in renderings()) + "\n]\n"


if __name__ == "__main__":
    FILE.write_text(file_text())
