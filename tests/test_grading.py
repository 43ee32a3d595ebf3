"""What graders extract from completions, and what they find right."""

import pytest

from latro import grading
from latro.data import Example
from latro.grading import code_grader, graders_for, majority_answer
from latro.sandbox import Limits

TEMPLATE = "The answer is {answer}."
GSM8K = {grader.name: grader for grader in graders_for("gsm8k", TEMPLATE)}
OPTIONS = {grader.name: grader for grader in graders_for("arc", TEMPLATE)}
PLANETS = ("Planetary density will decrease.", "Planetary years will become longer.", "Days, shorter", "9.8 m/s")


def graded(grader, said, answer, options=()):
    extracted = grader.extract(said, options)
    return extracted, grader.is_right(extracted, answer)


# --- GSM8K ---


@pytest.mark.parametrize(
    ("said", "flexible", "latro", "strict", "cot"),
    [
        ("So 6 * 3 = 18.\n#### 18", "18", "18", "18", None),
        ("#### 18\n\nQuestion: and 7?\n#### 21", "21", "21", "18", None),
        ("#### 1,234.50", "1234.50", "1234.5", "1234.50", None),
        ("#### $18", "18", "18", None, None),
        ("She pays $1,234.", "1234", "1234", None, None),
        ("The answer is 42. That is 7 more.", "7", "42", None, "42"),
        ("The answer is 1.\nThe answer is 2.", "2", "2", None, "1"),
        ("The answer is $42.", "42", "42", None, None),
        ("the answer is 5. Or 6", "6", "6", None, None),
        ("4 of 5. The answer is five.", "5", "5", None, None),
        ("It falls to -7 degrees", "-7", "-7", None, None),
        ("It is 3...", "3..", "3", None, None),
        ("That much is .5 left", ".5", "0.5", None, None),
        ("Nothing at all", None, None, None, None),
        ("Wait...", "..", None, None, None),
        ("", None, None, None, None),
        # cot takes a number's last character for the one behind it, where there is no other
        ("The answer is 42", "42", "42", None, "4"),
        ("The answer is 4", "4", "4", None, None),
    ],
)
def test_numbers(said, flexible, latro, strict, cot):
    given = {name: grader.extract(said, ()) for name, grader in GSM8K.items()}
    assert given == {"flexible": flexible, "latro": latro, "strict": strict, "cot": cot}


@pytest.mark.parametrize(
    ("name", "said", "answer", "right"),
    [
        ("flexible", "The answer is 1,000.", "1000", True),
        ("flexible", "The answer is 1000.", "1,000", True),
        ("flexible", "The answer is 1000.0", "1000", False),  # a string comparison
        ("latro", "The answer is 1000.0", "1000", True),  # of floats
        ("latro", "The answer is 1000.", "1,000", True),
        ("latro", "The answer is -3.", "3", False),
        ("latro", "No number", "3", False),
        ("strict", "#### 18", "18", True),
        ("strict", "18", "18", False),
        ("cot", "The answer is 18.", "18", True),
    ],
)
def test_right_numbers(name, said, answer, right):
    assert graded(GSM8K[name], said, answer)[1] is right


def test_equal_numbers_vote_together():
    said = ["The answer is 5.", "The answer is 7.", "The answer is 7.", "The answer is 5.0.", "The answer is 5.00"]
    assert majority_answer([GSM8K["latro"].extract(one, ()) for one in said]) == "5"


# --- Options ---


@pytest.mark.parametrize(
    "said",
    [
        "The answer is Planetary years will become longer.",
        "the answer is: planetary years  will become LONGER",
        "The answer is 'Planetary years will become longer.'.",
        "The answer is ['Planetary years will become longer'].",
        "**The answer is Planetary years will become longer.**",
        "The answer is (Planetary years will become longer.)",
        "The answer is\nPlanetary years will become longer.",
        "The answer is Planetary years will become longer. I am sure.\nThe end.",
        "The answer is A. No! The answer is B.",
        "The answer is B",
        "The answer is (b).",
        "The answer is option B.",
        "The answer is B. Planetary years will become longer.",
        "The answer is (B) Planetary years will become longer.",
    ],
)
def test_exact_options(said):
    assert graded(OPTIONS["exact"], said, PLANETS[1], PLANETS) == (PLANETS[1], True)


@pytest.mark.parametrize(
    ("said", "extracted"),
    [
        ("Planetary years will become longer.", None),
        ("The answer is", None),
        ("The answer isn't B.", None),
        ("The answer is not B.", "not B"),
        ("The answer is E.", "E"),
        ("The answer is (A) Planetary years will become longer.", "(A) Planetary years will become longer"),
        ("The answer is years. The rest is B.", "years"),
        ("The answer is Planetary density will decrease. Planetary years will become longer.", PLANETS[0]),
    ],
)
def test_not_exactly_the_option(said, extracted):
    assert graded(OPTIONS["exact"], said, PLANETS[1], PLANETS) == (extracted, False)


def test_text_of_an_option_goes_before_letters():
    options = ("B", "A", "1.5", "D")
    assert graded(OPTIONS["exact"], "The answer is A.", "A", options) == ("A", True)
    assert graded(OPTIONS["exact"], "The answer is 1.5.", "1.5", options) == ("1.5", True)
    assert graded(OPTIONS["exact"], "The answer is C.", "1.5", options) == ("1.5", True)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("ss or SS", 1),
        ("Ss or SS", 0),
        ("SS OR SS", 0),  # neither: the first
        ("(B) ss or SS", 1),
        ("Neon (Ne)", 2),
        ("(Neon (Ne))", 2),
        ("(c) neon (Ne)", 2),
        ("D. (a) and (b)", 3),
        ("['(a) and (b)'].", 3),
        ("['Earth's mantle.'].", 4),
    ],
)
def test_options_of_chemistry_and_genetics(said, named):
    options = ("Ss or SS", "ss or SS", "Neon (Ne)", "(a) and (b)", "Earth's mantle")
    assert OPTIONS["exact"].extract(f"The answer is {said}", options) == options[named]


def test_case_decides_between_options_that_differ_by_case():
    options = ("Ss or SS", "ss or SS")
    assert graded(OPTIONS["exact"], "The answer is ss or SS.", "Ss or SS", options) == ("ss or SS", False)


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("The answer is that planetary years will become longer, I think", PLANETS[1], True),
        ("The answer is Days, shorter or planetary years will become longer.", PLANETS[1], True),
        ("So planetary years will become longer.", PLANETS[1], True),  # no template: the last sentence
        ("Planetary years will become longer. So there.", PLANETS[1], False),
        # of several sentences with the template, the first
        ("The answer is: planetary years will become longer. The answer is X.", PLANETS[1], True),
        ("The answer is X. The answer is planetary years will become longer.", PLANETS[1], False),
        ("The answer is 9.8 m/s.", PLANETS[3], False),  # any full stop ends a sentence
        ("", PLANETS[1], False),
        ("The answer is", PLANETS[1], False),
    ],
)
def test_containment(said, answer, right):
    assert graded(OPTIONS["containment"], said, answer, PLANETS)[1] is right


# --- Any other answer ---


@pytest.mark.parametrize(
    ("template", "said", "extracted"),
    [
        (TEMPLATE, "The answer is x. No: The answer is 3.5.", "3.5"),
        (TEMPLATE, "The answer is 3.5. I am sure. The end.", "3.5"),
        (TEMPLATE, "The answer is 3.5", "3.5"),
        (TEMPLATE, "The answer is Paris, France.\nAnd so on.", "paris, france"),
        (TEMPLATE, 'The answer is "Paris".', "paris"),
        (TEMPLATE, "The  answer\nis *Paris*.", "paris"),
        (TEMPLATE, "The answer is (1, 2].", "(1, 2]"),
        (TEMPLATE, "The answers are 3.", None),
        (TEMPLATE, "The answer is ", None),
        ("#{answer}", "b2c9d7#7", "7"),
        ("#{answer}", "b2#1 c9#7\nd", "7"),
        ("#{answer}", "b2c9d7", None),
        ("<answer>{answer}</answer>", "<answer>a b</answer>. Or so.", "a b"),
        ("{answer}", "Think.\nMore.\n42\n", "42"),
        ("{answer}", "", None),
        ("What is $x$? {answer}!", "what is $x$? Yes! Sure.", "yes"),
    ],
)
def test_behind_the_template(template, said, extracted):
    (grader,) = graders_for("some.jsonl", template)
    assert grader.extract(said, ()) == extracted


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [("New  york", "New York.", True), ("[1, 2]", "(1, 2)", False), ("-5", "5", False), ("3.50", "3.5", False)],
)
def test_right_text(said, answer, right):
    (grader,) = graders_for("some.jsonl", TEMPLATE)
    assert graded(grader, f"The answer is {said}.", answer)[1] is right


def test_primary_graders():
    names = [[grader.name for grader in graders_for(*of)] for of in (("gsm8k", TEMPLATE), ("arc", TEMPLATE))]
    assert names == [["flexible", "latro", "strict", "cot"], ["exact", "containment"]]
    assert [grader.name for grader in graders_for("x.jsonl", TEMPLATE, options=True)] == ["exact", "containment"]


def test_template_without_answer():
    with pytest.raises(ValueError, match=r"answer_template must hold \{answer\} once, got 'The answer'"):
        graders_for("gsm8k", "The answer")


# --- MATH and SVAMP ---


@pytest.mark.parametrize(
    ("said", "extracted"),
    [
        (r"So $\boxed{\frac{1}{2}}$. The answer is 7.", "1/2"),
        (r"\boxed{3} or rather \boxed{0.50}", "1/2"),
        ("The answer is 0.5", "1/2"),
        ("The answer is 0.5. I am sure.", "1/2"),
        (r"The answer is $\frac12$.", "1/2"),
        ("The answer is (2, 1).", "(2,1)"),
        ("It is 0.5.", None),
        ("", None),
    ],
)
def test_formulas(said, extracted):
    (grader,) = graders_for("math", TEMPLATE)
    assert grader.extract(said, ()) == extracted


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        (r"\dfrac{2}{4}", r"\frac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        ("10,000", r"10,\!000", True),
        (r"x = 5", "5", True),
        (r"-\frac{1}{2}", r"\frac{1}{2}", False),
        ("0.33", r"\frac{1}{3}", False),
        ("(1, 2)", "(2, 1)", False),
        (r"5\text{ cm}", "5", True),
    ],
)
def test_right_formulas(said, answer, right):
    (grader,) = graders_for("math", TEMPLATE)
    assert graded(grader, rf"So $\boxed{{{said}}}$.", answer)[1] is right


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("8 - 5 = 3. The answer is 3.", "3", True),
        ("The answer is 3.0", "3", True),
        ("The answer is 0.5.", "0.5", True),
        ("The answer is $1,500.", "1500", True),
        ("The answer is -3.", "3", False),
        ("The answer is three.", "3", False),
    ],
)
def test_svamp(said, answer, right):
    graders = graders_for("svamp", TEMPLATE)
    assert [grader.name for grader in graders] == ["latro", "flexible"]
    assert graded(graders[0], said, answer)[1] is right


@pytest.mark.parametrize("dataset", ["csqa", "hellaswag"])
def test_options_of_other_data_sets(dataset):
    assert [grader.name for grader in graders_for(dataset, TEMPLATE)] == ["exact", "containment"]


# --- Code ---

BEGUN = 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """ The sum.\n    """\n'
CHECK = "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n\ncheck(total)\n"
TOTAL = Example("HumanEval/900", "?", BEGUN + "    return sum(xs)", harness=(BEGUN, CHECK))
DOUBLE = Example("901", "?", "def double(x):\n    return 2 * x", harness=("import math\n", "assert double(1) == 2\n"))
FENCED = "```python\n{answer}\n```"


@pytest.fixture
def may_run(monkeypatch):
    monkeypatch.setenv("LATRO_RUN_CODE", "1")


@pytest.mark.parametrize("value", [None, "0", "true"])
def test_code_is_run_only_on_request(monkeypatch, value):
    monkeypatch.delenv("LATRO_RUN_CODE", raising=False)
    if value is not None:
        monkeypatch.setenv("LATRO_RUN_CODE", value)
    for graders in (lambda: code_grader([TOTAL]), lambda: graders_for("humaneval", FENCED, examples=[TOTAL])):
        with pytest.raises(ValueError, match=r"run only where LATRO_RUN_CODE=1, got .*; latro/sandbox\.py says"):
            graders()


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```", True),
        (
            "First\n```python\ndef total(xs):\n    return 0\n```\nbut better\n"
            "```\ndef total(xs):\n    return sum(xs)\n```",
            True,
        ),
        ("```py\ndef total(xs):\n    s = 0\n    for x in xs:\n        s += x\n    return s", True),  # cut off behind it
        ("    return sum(xs)", True),  # goes on where the prompt ended
        ("    return sum(xs) + 0 * len(xs)\n", True),
        ("```python\ndef total(xs):\n    return 3\n```", False),
        ("```python\ndef add(xs):\n    return sum(xs)\n```", False),  # the beginning alone gives None
        ("```python\nimport sys\nsys.exit(0)\n```", False),
        ("```python\nimport os\nos._exit(0)\n```", False),
        ("```python\ndef total(xs):\n    while True: pass\n```", False),
        ("I cannot say.", False),
        ("", False),
    ],
)
def test_code(may_run, said, right):
    grader = code_grader([TOTAL, DOUBLE], FENCED, Limits(seconds=2))
    assert grader.is_right(grader.extract(said, ()), TOTAL.answer) is right


def test_right_answers_are_right_code(may_run):
    for dataset in ("humaneval", "mbpp", "some.jsonl"):
        (grader,) = graders_for(dataset, FENCED, examples=[TOTAL, DOUBLE])
        assert grader.name == "tests"
        for example in (TOTAL, DOUBLE):
            said = "Sum them up.\n" + FENCED.format(answer=example.answer)
            assert grader.is_right(grader.extract(said, ()), example.answer)
    assert not grader.is_right(TOTAL.answer, DOUBLE.answer)


def test_code_behind_a_template(may_run):
    grader = code_grader([DOUBLE], "CODE: {answer}")
    assert grader.extract("Think.\nCODE: def double(x):\n    return x + x\n", ()) == "def double(x):\n    return x + x"


def test_equal_code_passes_all_of_its_tests(may_run):
    other = Example("902", "?", DOUBLE.answer, harness=("", "assert double(2) == 4\n"))
    grader = code_grader([DOUBLE, other])
    assert grader.is_right("def double(x): return x + x", DOUBLE.answer)
    assert not grader.is_right("def double(x): return x + 1", DOUBLE.answer)


def test_code_that_has_no_tests(may_run):
    with pytest.raises(ValueError, match="examples must be those that are graded, for they have the tests, got none"):
        graders_for("humaneval", FENCED)
    with pytest.raises(ValueError, match="examples must have a harness, got none for 'x'"):
        code_grader([Example("x", "?", "1")])
    with pytest.raises(ValueError, match="the answer must be one of its examples', got 'def f'"):
        code_grader([DOUBLE]).is_right("x = 1", "def f")


def test_a_system_without_guards_warns(may_run, monkeypatch):
    monkeypatch.setattr(grading.sandbox, "unguarded", lambda: ("files", "network"))
    with pytest.warns(UserWarning, match="does not keep code that a model wrote from files, network"):
        code_grader([DOUBLE])


# --- Majority ---


@pytest.mark.parametrize(
    ("extracted", "winner"),
    [
        (["a", "b", "b"], "b"),
        (["b", "a", "a", "b"], "b"),  # a tie goes to the first seen
        ([None, None, "a"], "a"),
        ([None, None], None),
        ([], None),
    ],
)
def test_majority(extracted, winner):
    assert majority_answer(extracted) == winner
