r"""Equality by sympy, through math-verify: for what neither strings nor fractions decide.

Its one expensive step is to simplify a difference that is not nothing. So two expressions are first evaluated at one
point: where they differ there, they are not equal, in milliseconds. The step remains for expressions that agree.
"""

import logging
from dataclasses import replace
from functools import lru_cache
from typing import Any

__all__ = ["symbolically_equal"]

POINT, STRIDE = 0.7310585786, 0.1732050808
"""Value of the first free symbol by name, and what each further one adds: positive, so that roots and logarithms of
them are real, and between 0 and 1 mostly, so that large powers do not drown the rest."""
ABSOLUTE, RELATIVE = 1e-5, 1e-9
"""What two values must differ by: ten times math-verify's rounding (six decimals), and far over 15 digits' error."""
SMALL = 1e-3
"""Small values differ by this share of the larger one: to math-verify's six decimals 1.6e-19 and 0.17e-19 are both 0."""
NOISE, CONSTANT_NOISE = 1e-12, 1e-60
"""Below it a value may be a rounding error of 0: with symbols, at a point of 15 digits; of constants, by sympy's 100."""


def symbolically_equal(answer: str, label: str) -> bool:
    """Whether math-verify holds two LaTeX texts for equal; False where it can read one of them not at all.

    May take for ever: call it where it can be killed.
    """
    gold, stated = _parsed(label), _parsed(answer)
    if not gold or not stated:
        return False
    if "%" not in answer + label and _differ(gold[0], stated[0]):
        return False

    from math_verify import verify

    # timeout_seconds: its limit is SIGALRM, which works in a main thread only and cannot end a C call.
    return verify(list(gold), list(stated), allow_set_relation_comp=True, timeout_seconds=None)


@lru_cache(maxsize=256)
def _parsed(text: str) -> tuple[Any, ...]:
    """As sympy expressions. A group's responses share their label, and often their answers."""
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    # LaTeX only: math-verify reads plain expressions with sympy's parse_expr, which evaluates them as Python.
    config = LatexExtractionConfig()
    # Its units have single letters among them, so that 4t would be 4; `plain` has taken the units out.
    config = replace(config, normalization_config=replace(config.normalization_config, units=False))
    found = parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
    return tuple(found)


def _differ(one: Any, other: Any) -> bool:
    """Whether two scalar expressions have clearly different values at one point; False where that cannot be told."""
    from sympy import Expr

    # A lone symbol may be a word, which math-verify compares with a product of letters by its name.
    if not (isinstance(one, Expr) and isinstance(other, Expr)) or one.is_Symbol or other.is_Symbol:
        return False
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    point: Any = {symbol: POINT + STRIDE * index for index, symbol in enumerate(symbols)}
    try:
        a, b = (complex(side.evalf(15, subs=point)) for side in (one, other))
        gap, larger = abs(a - b), max(abs(a), abs(b))
        far = gap > SMALL * larger and larger > (NOISE if symbols else CONSTANT_NOISE)
        return far or gap > ABSOLUTE + RELATIVE * (abs(a) + abs(b))  # false for nan
    except (TypeError, ValueError, ArithmeticError, AttributeError, RecursionError):
        return False
