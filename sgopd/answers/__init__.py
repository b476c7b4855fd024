r"""What an answer is, and when two are equal: readers that turn LaTeX into a small typed value, and rules that compare.

`readers.READERS` is a table: a reader takes cleaned LaTeX and returns a `Value`, or None where the text is not of its
kind; the first that reads it counts. Each says what it reads and has examples, which a test runs. A reader accounts
for every character: what none of them reads is of kind "unread", and is correct only where it is spelled like the gold.

`Comparer.compare` tells whether two values are equal: True, False, or None where that rests on text that only one
of them has. `rules.RULES` has a comparison for each kind; values of two kinds are equal where one can be seen as
the other (`mixed.MIXED`). What needs sympy is asked of `Comparer.same_formula`: here that raises `NeedsWorker`, and
`sgopd.math_equality` has a comparer that can. All of it is string work in linear time on capped input.

    latex.py    one spelling for equal LaTeX, and splitting it outside brackets
    value.py    Value, and read()
    numbers.py  units.py    plain numbers; units of measurement
    words.py  sets.py  equations.py  figures.py  formulae.py  quantities.py    the readers
    readers.py  their table, in order
    comparer.py  rules.py  mixed.py    when two values are equal
"""

from sgopd.answers import mixed, readers, rules  # noqa: F401 (they fill the tables)
from sgopd.answers.comparer import Comparer, NeedsWorker
from sgopd.answers.latex import clean, spelling
from sgopd.answers.numbers import number
from sgopd.answers.units import another_case, unit
from sgopd.answers.value import Value, read

__all__ = ["Comparer", "NeedsWorker", "Value", "another_case", "clean", "number", "read", "spelling", "unit"]
