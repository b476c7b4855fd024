"""Units of measurement: how many base units one is, and of what; and names whose case matters."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from sgopd.answers.value import word_list

# Dimensions: what a unit is made of, and how many of the base units it is.
_BASE_UNITS = {
    "length": "m:1 meter:1 metre:1 in:0.0254 inch:0.0254 inches:0.0254 ft:0.3048 foot:0.3048 feet:0.3048 yd:0.9144 "
    "yard:0.9144 mi:1609.344 mile:1609.344",
    "time": "s:1 sec:1 second:1 min:60 minute:60 h:3600 hr:3600 hour:3600 day:86400 week:604800",
    "cup": "cup:1 pint:2 quart:4 gallon:16 tablespoon:1/16 tbsp:1/16 teaspoon:1/48 tsp:1/48",
    "month": "month:1 year:12 yr:12",
    "mass": "g:1 gram:1 lb:453.59237 pound:453.59237 oz:28.349523125 ounce:28.349523125 tonne:1000000 ton:1000000",
    "current": "A:1 amp:1 ampere:1",
    "amount": "mol:1 mole:1",
    "kelvin": "K:1 kelvin:1",
    "celsius": "celsius:1",
    "fahrenheit": "fahrenheit:1",
    "dollar": "dollar:1 USD:1 buck:1 cent:0.01",
    "euro": "euro:1 EUR:1",
    "sterling": "sterling:1 GBP:1",
    "yen": "yen:1",
    "rupee": "rupee:1 Rs:1",
    "radian": "rad:1 radian:1",
    "byte": "byte:1",
    "bit": "bit:1",
}
_DERIVED = {  # in grams, metres, seconds and amperes
    "L liter litre": ("1/1000", "length:3"),
    "N newton": ("1000", "mass:1 length:1 time:-2"),
    "J joule": ("1000", "mass:1 length:2 time:-2"),
    "W watt": ("1000", "mass:1 length:2 time:-3"),
    "Pa pascal": ("1000", "mass:1 length:-1 time:-2"),
    "V volt": ("1000", "mass:1 length:2 time:-3 current:-1"),
    "C coulomb": ("1", "current:1 time:1"),
    "F farad": ("1/1000", "mass:-1 length:-2 time:4 current:2"),
    "Ω ohm": ("1000", "mass:1 length:2 time:-3 current:-2"),
    "T tesla": ("1000", "mass:1 time:-2 current:-1"),
    "H henry": ("1000", "mass:1 length:2 time:-2 current:-2"),
    "Hz hertz": ("1", "time:-1"),
    "mph": ("0.44704", "length:1 time:-1"),
    "kph kmh": ("5/18", "length:1 time:-1"),
    "cc": ("1/1000000", "length:3"),
    "hectare ha": ("10000", "length:2"),
}
_PREFIXES = {"k": 3, "c": -2, "m": -3, "μ": -6, "n": -9, "M": 6, "G": 9, "d": -1, "p": -12, "T": 12}
_LONG_PREFIXES = {"kilo": 3, "centi": -2, "milli": -3, "micro": -6, "nano": -9, "mega": 6, "giga": 9, "deci": -1}
_METRIC = word_list("m g s L l A N J W Pa V C F Ω T H Hz mol K")
_LONG_METRIC = word_list(
    "meter metre gram second liter litre newton joule watt pascal volt coulomb farad ohm hertz amp ampere mole"
)
Dimensions = tuple[tuple[str, int], ...]
Unit = tuple[Fraction, Dimensions]


def _all_units() -> dict[str, Unit]:
    units: dict[str, Unit] = {}
    for dimension, names in _BASE_UNITS.items():
        for name, _, factor in (entry.partition(":") for entry in names.split()):
            units[name] = Fraction(factor), ((dimension, 1),)
    for names, (factor, powers) in _DERIVED.items():
        made = tuple(
            sorted((name, int(power)) for name, _, power in (entry.partition(":") for entry in powers.split()))
        )
        units |= {name: (Fraction(factor), made) for name in names.split()}
    units["l"] = units["L"]
    for roots, prefixes in ((_METRIC, _PREFIXES), (_LONG_METRIC, _LONG_PREFIXES)):
        for unit in roots:
            for prefix, exponent in prefixes.items():
                scale, dimensions = units[unit]
                units.setdefault(prefix + unit, (scale * Fraction(10) ** exponent, dimensions))
    for name in [name for name in units if len(name) > 2 and name.islower()]:
        units.setdefault(name + "s", units[name])
    units |= {name + "s": units[name] for name in ("hr", "yr", "lb", "min", "sec")}
    return units


UNITS = _all_units()
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_UNIT_TOKEN = re.compile(r"([A-Za-zΩμ¢]+)\.?|(/|per)|(\\cdot|\*|-)|\^ ?\{? ?(-?\d) ?\}?| |([{}()])")


@lru_cache(maxsize=4096)
def unit(text: str) -> Unit | None:
    """A product of units with powers, such as ⟦m⟧/⟦s⟧^{2} or ⟦square miles per hour⟧; None if a word is no unit."""
    text = re.sub(r"\\frac ?\{([^{}]*)\} ?\{([^{}]*(?:\{\d\})?[^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\mu[\s⟦]*", "μ", text).replace(r"\Omega", "Ω").replace("⟦", " ").replace("⟧", " ")
    text = re.sub(r"\^\s*\\circ\s*(C|F)(?![a-z])", lambda m: " celsius" if m[1] == "C" else " fahrenheit", text)
    text = re.sub(r"\bdegrees? (celsius|fahrenheit)", r"\1", text, flags=re.IGNORECASE)
    powers: dict[str, int] = {}
    last: tuple[Unit, int] | None = None
    factor, sign, pending, position = Fraction(1), 1, 1, 0
    while position < len(text):
        match = _UNIT_TOKEN.match(text, position)
        if match is None:
            return None
        position = match.end()
        word, over, _, power, _ = match.groups()
        if over or word == "per":
            sign, last = -1, None
        elif word and word.casefold() in _POWERS:
            pending = _POWERS[word.casefold()]
        elif word and word.casefold() in ("squared", "cubed") and last:
            power = "2" if word.casefold() == "squared" else "3"
            word = None
        elif word:
            found = UNITS.get(word) or UNITS.get(word.casefold() if len(word) > 3 else "")
            if found is None:
                return None
            last = found, sign
            factor *= found[0] ** (sign * pending)
            for name, exponent in found[1]:
                powers[name] = powers.get(name, 0) + exponent * sign * pending
            pending = 1
        if power and word is None:
            if last is None:
                return None
            (scale, made), direction = last
            factor *= scale ** (direction * (int(power) - 1))
            for name, exponent in made:
                powers[name] += exponent * direction * (int(power) - 1)
            last = None
    made = tuple(sorted((name, power) for name, power in powers.items() if power))
    return (factor, made) if made else None


_ELEMENTS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb "
    "Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg "
    "Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu"
)
_COMPOUND_NAME = re.compile(rf"(?:(?:{'|'.join(sorted(_ELEMENTS.split(), key=len, reverse=True))})\d*)+")


def another_case(gold: str, answer: str) -> bool:
    """Whether a unit or a chemical formula has letters of another case: MW is not mW, nor Co carbon monoxide."""
    golds, answers = (set(re.findall(r"[A-Za-z]{2,}", text)) for text in (gold, answer))
    meant = {word.casefold(): word for word in golds - answers}
    for word in answers - golds:
        other = meant.get(word.casefold(), "")
        if other in UNITS and word in UNITS and UNITS[other] != UNITS[word]:
            return True
        if word.casefold() != "no" and _COMPOUND_NAME.fullmatch(other) and _COMPOUND_NAME.fullmatch(word):
            return True
        if re.search("[a-z][A-Z]|[A-Z]{2}[a-z]", other) and _COMPOUND_NAME.fullmatch(other):  # NaCl, HCl
            return True
    return False
