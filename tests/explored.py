"""What tests of exploration share: samples, what reads and explores them, and a wrong rationale that was explored."""

from latro.data import Example
from latro.explore import Attempt, Explored, Explorer, Step
from latro.grading import graders_for
from latro.rollout import Sample
from latro.text import Text
from tests.tiny import character_tokenizer

TOKENIZER = character_tokenizer()
END = TOKENIZER.eos_token_id
CHAIN = Example("e", "7*3+5:", "6", rationale="7*3=1;1+5=6;")
STEPS = ("7*3=1;", "1+5=7;", "#7")


def sampled(text, ended=True, tokenizer=TOKENIZER):
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Sample(tokens, end=tokenizer.eos_token_id if ended else None, ended_by="end" if ended else "length")


def text_of(tokenizer=TOKENIZER, template="#{answer}", separator="", stops=("#",)):
    return Text(
        tokenizer, answer_template=template, separator=separator, stop_strings=stops, end=tokenizer.eos_token_id
    )


def explorer_of(engine, text=None, max_tokens=64, **options):
    text = text or text_of()
    return Explorer(engine, text, graders_for("", text.answer_template)[0], frozenset({END}), max_tokens, **options)


def explored_as(rates, ways=(("1+5=6;#6",), ("1+5=6;#6",), ("#6",)), right=False):
    """STEPS, with right continuations before each of them as they are given, and none where the rate is 0."""
    steps = tuple(Step(text, tuple(sampled(text).tokens), is_answer=text[0] == "#") for text in STEPS)
    attempts = [
        (*(Attempt(sampled(way), True) for way in of_prefix if rate), Attempt(sampled("#0"), False))
        for rate, of_prefix in zip(rates, ways, strict=True)
    ]
    return Explored(CHAIN, sampled("".join(STEPS)), right, steps, tuple(attempts))
