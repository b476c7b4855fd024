"""The table of readers, in order: what each reads, and examples, which a test runs."""

from __future__ import annotations

from sgopd.answers.equations import equation, plus_minus, relation, sequence, system
from sgopd.answers.figures import based, degrees, ordinal, percent, ratio, remainder
from sgopd.answers.formulae import brackets, cycles, formula, matrix, vector
from sgopd.answers.quantities import quantity
from sgopd.answers.sets import braces, congruence, empty, family, union
from sgopd.answers.value import READERS, Reader
from sgopd.answers.words import choice, clock, date, labelled, sentence, words

# The first that reads a text counts: words and letters before mathematics, lists before what they consist of.
READERS += (
    Reader(
        "choice", "letters of a multiple choice", choice, ((r"\text{ACD}", "A, C, D", 1), ("(C)", r"\text{not C}", -1))
    ),
    Reader(
        "labelled",
        "a choice's letter and its value",
        labelled,
        (("B", r"\textbf{(B)}\ 12", 1), ("12", r"\text{(B)}\ 13", -1)),
    ),
    Reader("date", "a day", date, ((r"\text{June 20}", "20 June", 1), (r"\text{June 20}", "June 21", -1))),
    Reader(
        "clock",
        "a time of day",
        clock,
        (
            (r"6:30\text{ PM}", "18:30", 1),
            (r"9:15\text{ AM}", r"9:15\text{ PM}", -1),
            ("2:30", "5:12", -1),
            (r"\text{noon}", r"12:00\text{ PM}", 1),
            (r"\text{noon}", r"\text{midnight}", -1),
        ),
    ),
    Reader(
        "words",
        "words without mathematics",
        words,
        (
            (r"\text{no solution}", "No solutions.", 1),
            (r"\text{odd}", "even", -1),
            (r"\text{no real roots}", r"\text{No real roots exist.}", 1),
            (r"\text{converges}", r"\text{The series converges}", 1),
            (r"\text{converges}", r"\text{The series diverges}", -1),
            (r"\text{CO}", r"\text{Co}", 0),
            (r"\text{MW}", r"\text{mW}", 0),
        ),
    ),
    Reader(
        "",
        "an answer in a sentence",
        sentence,
        (("31", r"\text{There are } 31 \text{ such integers.}", 1), ("31", r"\text{more than }31", 0)),
    ),
    Reader(
        "matrix", "matrices", matrix, ((r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{bmatrix}1&2\end{bmatrix}", 1),)
    ),
    Reader(
        "", "systems of equations, functions in pieces", system, ((r"\begin{cases}x=1\\y=2\end{cases}", "y=2, x=1", 1),)
    ),
    Reader("", "no number and every number", empty, ((r"\emptyset", r"\{\}", 1), ("0", r"\emptyset", -1))),
    Reader("", "plus or minus", plus_minus, ((r"\pm 3", "3, -3", 1), (r"\pm 3", "3", -1))),
    Reader("set", "a set", braces, ((r"\{1,2\}", r"\{2, 1, 1\}", 1), ("(2,5)", r"\{2,5\}", -1))),
    Reader("interval", "intervals", union, (("(2,\\infty)", r"\{x : x > 2\}", 1), ("[0,1)", "(0,1]", -1))),
    Reader(
        "congruence",
        "a class of residues",
        congruence,
        ((r"x\equiv5\pmod{12}", r"x\equiv-7\pmod{12}", 1), ("5", r"5\pmod{12}", 1)),
    ),
    Reader(
        "family",
        "values that depend on a whole number",
        family,
        ((r"k\pi, k\in\mathbb{Z}", r"n\pi, n\in\mathbb{Z}", 1),),
    ),
    Reader(
        "permutation",
        "cycles of a permutation",
        cycles,
        ((r"(1\ 3\ 2\ 4)", r"(3\ 2\ 4\ 1)", 1), (r"(1\ 3\ 2\ 4)", r"(1\ 2\ 3\ 4)", -1)),
    ),
    Reader(
        "list",
        "several answers",
        sequence,
        (("1, 1, 2", "2, 1, 1", 1), ("1, 1, 2", "1, 2", -1), ("30150", "30, 150", -1)),
    ),
    Reader(
        "relation",
        "inequalities",
        relation,
        (("x>3", "3<x", 1), ("x>3", r"x\ge3", -1), ("x+y<3", "3>x+y", 1), ("a<b<c", "c>b>a", 1)),
    ),
    Reader(
        "equation",
        "equations",
        equation,
        (
            ("5", "x=5", 1),
            ("5", "x+1=5", -1),
            ("y=2x+1", "2x-y+1=0", 1),
            ("y'=4y", r"\frac{dy}{dx}=4y", 1),
            ("f(x)=3x^2", "f(t)=3t^2", 1),
            ("f(x)=3x^2", "f(t)=3x^2", -1),
            ("f(x)=3x^2", "f(t)=2t^2", 0),
        ),
    ),
    Reader(
        "tuple",
        "unit vectors",
        vector,
        (
            (r"\langle4,0,-1\rangle", r"4\mathbf{i}-\mathbf{k}", 1),
            (r"3\vec{i}-\vec{j}", r"3\hat{\imath}-\hat{\jmath}", 1),
        ),
    ),
    Reader("tuple", "points, vectors", brackets, (("(1,2)", r"\left(1,\frac42\right)", 1), ("(1,2)", "(2,1)", -1))),
    Reader("based", "numbers in a base", based, (("1101_2", r"(1101)_{\text{two}}", 1), ("243_5", "243_6", -1))),
    Reader(
        "percent",
        "percentages",
        percent,
        ((r"12.5\%", r"12\frac12\%", 1), (r"25\%", r"\frac14", 1), (r"25\%", r"2.5\%", -1)),
    ),
    Reader(
        "degrees",
        "angles in degrees",
        degrees,
        ((r"60^\circ", r"\frac{\pi}{3}", 1), ("90", "90°", 1), (r"60^\circ", r"60\text{ radians}", -1)),
    ),
    Reader(
        "tuple",
        "a quotient with its remainder",
        remainder,
        ((r"5\text{ remainder }2", "5 R 2", 1), ("5", r"5\text{ remainder }2", -1)),
    ),
    Reader(
        "",
        "ordinal numbers",
        ordinal,
        (("7", r"7^{\text{th}}", 1), ("12", "21^{st}", -1), (r"5\text{th}", r"\text{fifth}", 1)),
    ),
    Reader(
        "formula",
        "what sympy reads",
        formula,
        (
            (r"\sqrt8", r"2\sqrt2", 1),
            ("1,234", "1234", 1),
            (r"\sqrt2", "1.41", -1),
            ("C_1e^x+C_2e^{-2x}", "Ae^x+Be^{-2x}", 0),
        ),
    ),
    Reader("ratio", "ratios", ratio, (("3:4", r"3\text{ to }4", 1), ("1:2:3", "2:4:6", 1), ("3:4", "4:3", -1))),
    Reader(
        "quantity",
        "a number with a unit, a noun, or words that matter",
        quantity,
        (
            (r"5\text{ L}", r"5\text{ mL}", -1),
            (r"2\text{ hours}", r"120\text{ minutes}", 1),
            ("6", r"6\text{ apples}", 1),
            (r"20\%\text{ increase}", r"20\%\text{ decrease}", -1),
            ("5", r"5\text{ million}", -1),
            (r"\$1.25", r"125\text{ cents}", 1),
        ),
    ),
)
