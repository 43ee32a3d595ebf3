"""Which answers in LaTeX are equal."""

import pytest

from latro.latex import boxed, normal

EQUAL = [
    (r"\frac12", "0.5"), (r"\dfrac{1}{2}", "1/2"), (r"\frac{1}2", ".50"), (r"\frac{-1}{2}", r"-\frac12"),
    (r"1\frac{1}{2}", "3/2"), (r"-1\frac12", "-1.5"), (r"\frac{4}{6}", r"\frac23"), ("6.0", "6"), ("+7", "7"),
    ("7.", "7"), ("1,234", "1234"), (r"1{,}234", "1234"), (r"10,\!000", "10000"), ("$12$", "12"), (r"\$3.50", "3.5"),
    (r"5\text{ cm}^2", "5"), (r"5 \mbox{ inches}", "5"), (r"2\sqrt{2}\text{ units}", r"2\sqrt 2"), (r"50\%", "50"),
    (r"45^\circ", "45"), (r"90^{\circ}", "90"), ("x=5", "5"), (r"x_1 = 5", "5"), (r"x \in [0,1)", "[0, 1)"),
    (r"\left(1,\frac{2}{4}\right)", "(1,0.5)"), ("1, -2", "-2,1"), (r"\{1,2\}", r"\left\{2, 1\right\}"),
    (r"\text{(A)}", "A"), (r"\text{Monday}", "Monday"), (r"-\frac{\pi}{2}", r"-\pi/2"), (r"\sqrt3", r"\sqrt{3}"),
    (r"\frac{\sqrt{3}}2", r"\frac{\sqrt3}{2}"), (r"\frac ab", r"\frac{a}{b}"), (r"x^{2}", "x^2"),
    (r"x\leq 3", r"x \le 3"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
]  # fmt: skip
DIFFERENT = [
    ("1/3", "0.33"), ("(1,2)", "(2,1)"), ("[0,1]", "[0,1)"), ("-5", "5"), ("12", "1,2"), ("1,234", "1,2,34"),
    (r"\{1,2\}", "(1,2)"), (r"\sqrt{2}", "2"), ("x+1", "1+x"), (r"\frac{1}{0}", "1"), ("A", "B"), ("", "0"),
    (r"(0,1)\cup(2,3)", "(0,1)"), (r"2\pi", "2"), (r"x^{12}", "x^12"), (r"\infty", r"-\infty"), ("5x", "5"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal(one, other):
    assert normal(one) == normal(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different(one, other):
    assert normal(one) != normal(other)


def test_a_normal_form_is_its_own():
    for one in {text for pair in EQUAL for text in pair if "text" not in text}:
        assert normal(normal(one)) == normal(one)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so it is $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \fbox{2}", "2"),
        (r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),
        (r"\boxed{\{1\}", None),
        (r"$\boxed 5$ and more", "5"),
        (r"\boxed{", None),
        (r"\boxed{}", None),
        ("5", None),
    ],
)
def test_the_last_box(text, inside):
    assert boxed(text) == inside
