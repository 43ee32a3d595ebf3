"""What a completion answers, and whether that is right: text in, text out.

For GSM8K the rules of lm-eval and of LaTRO's authors, for options LaTRO's containment beside an exact one, for MATH the
answers' meaning, for code its tests, and for any other answer what stands behind the answer's template.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from latro import sandbox
from latro.data import Example
from latro.latex import boxed, normal

# Must be 1 for code that models write to be run at all.
RUN_CODE = "LATRO_RUN_CODE"


@dataclass(frozen=True)
class Grader:
    """A rule by which completions are right or wrong."""

    name: str
    extract: Callable[[str, Sequence[str]], str | None]  # of a completion, with the options there were, the answer
    equal: Callable[[str, str], bool]  # an extracted answer, and the right one

    def is_right(self, extracted: str | None, answer: str) -> bool:
        return extracted is not None and self.equal(extracted, answer)


def graders_for(
    dataset: str, answer_template: str, *, options: bool = False, examples: Sequence[Example] = ()
) -> tuple[Grader, ...]:
    """The graders of a data set, the primary one first: its accuracy is `accuracy`, every other's `accuracy/NAME`.

    gsm8k: `flexible` is primary, for it is lm-eval's rule that the literature quotes, and asks for no template, which
    a model before training does not know. `latro` is the rule of LaTRO's authors; `strict` and `cot` are lm-eval's.
    svamp: `latro` is primary, for these numbers have decimals.
    math: by `latro.latex.normal`, of the last box, or else behind the template.
    options: `exact` is primary, for LaTRO's `containment` takes an answer that names all options for right.
    humaneval, mbpp: by running the code against the tests of `examples`; see `code_grader`.
    """
    if answer_template.count("{answer}") != 1:
        raise ValueError(f"answer_template must hold {{answer}} once, got {answer_template!r}")
    prefix, suffix = answer_template.split("{answer}")
    if dataset == "gsm8k":
        return GSM8K
    if dataset == "svamp":
        return (GSM8K[1], GSM8K[0])
    if dataset == "math":
        return (Grader("math", partial(_formula, prefix, suffix), lambda said, answer: said == normal(answer)),)
    if dataset in ("humaneval", "mbpp") or any(example.harness for example in examples):
        return (code_grader(examples, answer_template),)
    if dataset in ("arc", "csqa", "hellaswag") or options:
        return (
            Grader("exact", partial(_option, prefix), _same_option),
            Grader("containment", partial(_containing, prefix), _contains),
        )
    return (Grader("exact", partial(_behind_template, prefix, suffix), lambda said, answer: said == _plain(answer)),)


def majority_answer(extracted: Sequence[str | None]) -> str | None:
    """The most common answer, of equally common ones the first; None only where there is no other."""
    counts = Counter(answer for answer in extracted if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


# GSM8K. The patterns are those of lm-eval's tasks, with what they do at a text's end: `cot` needs a character after the
# number, and takes the number's last digit for it where there is no other.

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
COT = re.compile(r"The answer is (\-?[0-9\.\,]+).")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
NUMBER = re.compile(r"-?[0-9,]*\.?[0-9]+")  # LaTRO's


def _first(pattern: re.Pattern[str], text: str, options: Sequence[str]) -> str | None:
    found = pattern.search(text)
    return None if found is None else _lm_eval_number(found[1]) or None


def _last(text: str, options: Sequence[str]) -> str | None:
    found = [match[0] for match in FLEXIBLE.finditer(text)]
    return _lm_eval_number(found[-1]) or None if found else None


def _lm_eval_number(text: str) -> str:
    """What lm-eval's exact_match compares."""
    return text.replace(",", "").replace("$", "").removesuffix(".")


def _latro_number(text: str, options: Sequence[str] = ()) -> str | None:
    """The first number behind the last "The answer is", or else the last number."""
    _, said, behind = text.rpartition("The answer is")
    numbers = NUMBER.findall(behind) if said else []
    number = numbers[0] if numbers else (NUMBER.findall(text) or [None])[-1]
    return None if number is None else repr(float(number.replace(",", ""))).removesuffix(".0")


def _same_number(said: str, answer: str) -> bool:
    number = _latro_number(answer)
    return number is not None and float(said) == float(number)


GSM8K = (
    Grader("flexible", _last, lambda said, answer: said == _lm_eval_number(answer)),
    Grader("latro", _latro_number, _same_number),
    Grader("strict", partial(_first, STRICT), lambda said, answer: said == _lm_eval_number(answer)),
    Grader("cot", partial(_first, COT), lambda said, answer: said == _lm_eval_number(answer)),
)


# Answers behind a template

QUOTES = frozenset({'""', "''", "“”", "‘’", "$$"})
BRACKETS = frozenset({"()", "[]", "{}", "<>"})
APOSTROPHE = re.compile(r"(?<=\w)['’](?=\w)")


def _behind_template(prefix: str, suffix: str, text: str, options: Sequence[str]) -> str | None:
    return _plain(_within_template(prefix, suffix, text)) or None


def _within_template(prefix: str, suffix: str, text: str) -> str:
    line = _line_behind(prefix, text)
    suffix = suffix.strip()
    # A full stop may stand within an answer; behind one, white space follows.
    end = re.escape(suffix) + (r"(?!\S)" if suffix in set(".,;:!?") else "")
    return re.split(end, line, maxsplit=1)[0] if suffix else line


def _line_behind(prefix: str, text: str) -> str:
    """What stands behind the last occurrence of a template's beginning, up to the end of that line."""
    words = r"\s+".join(re.escape(word) for word in prefix.split())
    if not words:
        return text.strip().rpartition("\n")[2]
    found = list(re.finditer(words + (r"\b" if prefix.strip()[-1].isalnum() else ""), text, re.IGNORECASE))
    return text[found[-1].end() :].lstrip(": \t\n").partition("\n")[0] if found else ""


def _plain(text: str) -> str:
    return _bare(text, QUOTES).casefold()


def _bare(text: str, pairs: frozenset[str]) -> str:
    """Without surplus white space, emphasis, a full stop at the end, or quotes and the like around it."""
    text = " ".join(text.split())
    while True:
        bare = text.strip(" *`").rstrip(".,;: ")
        if len(bare) > 1 and bare[0] + bare[-1] in pairs and _encloses(bare):
            bare = bare[1:-1]
        if bare == text:
            return text
        text = bare


def _encloses(text: str) -> bool:
    """Whether the first character is closed by the last, and not before."""
    opening, closing = text[0], text[-1]
    depth = 0
    for character in APOSTROPHE.sub("", text[1:-1]):
        if character == closing and depth == 0:
            return False
        depth += (character == opening) - (character == closing)
    return depth == 0


# Options


def _option(prefix: str, text: str, options: Sequence[str]) -> str | None:
    """The option that is named behind the template's beginning, or what else is said there."""
    line = _line_behind(prefix, text)
    if not line:
        return None
    ends = [len(line), *(match.start() for match in re.finditer(r"[.!?](?!\S)", line))]
    for end in sorted(ends, reverse=True):
        named = _named_option(_bare_option(line[:end]), options)
        if named is not None:
            return named
    return _bare_option(line[: min(ends)]) or None


def _named_option(said: str, options: Sequence[str]) -> str | None:
    """The option that these words are: its text, its letter, or both."""
    bare = [_bare_option(option) for option in options]
    folded = [option.casefold() for option in bare]
    if said in bare:  # in genetics, options may differ by case alone
        return options[bare.index(said)]
    if said.casefold() in folded:
        return options[folded.index(said.casefold())]
    lettered = re.fullmatch(r"(?:option |choice )?\(?([a-z])\)?[.:]?(?: (.+))?", said.casefold())
    if lettered is None:
        return None
    index = ord(lettered[1]) - ord("a")
    is_option = index < len(options) and (lettered[2] is None or _bare_option(lettered[2]) == folded[index])
    return options[index] if is_option else None


def _bare_option(text: str) -> str:
    return _bare(text, QUOTES | BRACKETS)


def _same_option(said: str, answer: str) -> bool:
    return _bare_option(said) == _bare_option(answer)


def _containing(prefix: str, text: str, options: Sequence[str]) -> str | None:
    """What LaTRO's authors search for the right option: the first sentence with the template's beginning, from there
    on, or else the last sentence. A sentence ends at any full stop, that of a decimal number included."""
    begin, text = prefix.strip().lower(), text.lower()
    edges = " '[]()\"."
    sentences = [sentence for sentence in text.split(".") if begin and begin in sentence]
    if sentences:
        said = sentences[0].rpartition(begin)[2].lstrip(":").strip(edges)
    else:
        said = text.strip(edges).rpartition(".")[2]
    return said or None


def _contains(said: str, answer: str) -> bool:
    return answer.lower().strip().rstrip(".") in said


# Formulas


def _formula(prefix: str, suffix: str, text: str, options: Sequence[str]) -> str | None:
    """In the form that equal answers share, so that they vote together."""
    return normal(boxed(text) or _within_template(prefix, suffix, text)) or None


# Code


def code_grader(
    examples: Sequence[Example], answer_template: str = "{answer}", limits: sandbox.Limits | None = None
) -> Grader:
    """Whether code passes the tests of the example whose answer is the right one.

    This runs what a model wrote, within the limits of `latro.sandbox`, and only where the environment says
    LATRO_RUN_CODE=1. What is run is a completion's last block of ```, or else what stands behind the template's
    beginning, or else all of it.
    """
    if os.environ.get(RUN_CODE) != "1":
        raise ValueError(
            f"code_grader: code that a model wrote is run only where {RUN_CODE}=1, got {os.environ.get(RUN_CODE)!r}; "
            "latro/sandbox.py says what it is kept from"
        )
    harnesses: dict[str, set[tuple[str, str]]] = {}
    for example in examples:
        if example.harness is None:
            raise ValueError(f"code_grader: examples must have a harness, got none for {example.id!r}")
        harnesses.setdefault(example.answer, set()).add(example.harness)  # equal answers pass each other's tests
    if not harnesses:
        raise ValueError("code_grader: examples must be those that are graded, for they have the tests, got none")
    if sandbox.unguarded():
        warnings.warn(
            f"this system does not keep code that a model wrote from {', '.join(sandbox.unguarded())}", stacklevel=2
        )

    def passes(said: str, answer: str) -> bool:
        if answer not in harnesses:
            raise ValueError(f"code_grader: the answer must be one of its examples', got {answer[:60]!r}")
        programs = (f"{before}{said}\n{tests}" for before, tests in harnesses[answer])
        return all(sandbox.run(program, limits).passed for program in programs)

    return Grader("tests", partial(_code, answer_template.partition("{answer}")[0]), passes)


BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n?```|\Z)", re.DOTALL | re.IGNORECASE)


def _code(prefix: str, text: str, options: Sequence[str]) -> str | None:
    """As it is indented, for it may go on inside a function."""
    blocks = BLOCK.findall(text)
    code = blocks[-1] if blocks else text.rpartition(prefix)[2] if prefix else text
    return code.rstrip() or None
