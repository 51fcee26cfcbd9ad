"""The rule on answers whose class is plain to a reader, the paper's own among them."""

import pytest
from rationale import rationale

from jaxcrit.data import demo

ANSWERS = {
    # PAPER: the three answers of the case study.
    "Sure! Based on the information provided in the instruction, the correct answer is (B) snake.": "conclusion",
    "The answer is (B) snake.": "conclusion",
    "The answer is (B) snake.\n\nA snake is a predator because it hunts other animals for food.": "after",
    "10 + 5 = 15. 15 - 4 = 11. The answer is 11.": "before",
    "Sue hates green shoes, so no.": "before",
    "So the answer is no.": "conclusion",
    "Natalia sold 48/2 = 24 clips in May.\n#### 72": "before",
    "#### 72": "conclusion",
    "Snakes hunt. Therefore: B.": "conclusion",  # two words are not yet a reason
    "Snakes hunt other animals. Therefore: B.": "before",
    "Mia has so many hats.": "none",
    "Dear Pam, I like the dark coat.": "none",
    "True. The earth is round and it turns.": "none",
    "  ": "empty",
}


@pytest.mark.parametrize(("answer", "expected"), ANSWERS.items())
def test_answers(answer, expected):
    assert rationale(answer) == expected


@pytest.mark.parametrize(
    ("family", "expected"),
    [("arithmetic", "before"), ("choice", "before"), ("yesno", "before"), ("closed", "none"), ("refusal", "none")],
)
def test_the_embedded_models_families(family, expected):
    assert {rationale(row["response"]) for row in demo.generate(family, 200, split="test")} == {expected}
