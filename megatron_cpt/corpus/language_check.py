"""Whether a text is in the language it is said to be in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

ALIASES = {"zh-Hant": "zh", "iw": "he", "jw": "jv", "un": "unknown"}  # codes of cld2 -> codes of everybody else
ALIKE = {"nb": "no", "nn": "no", "sh": "sr", "hr": "sr", "bs": "sr", "ms": "id"}  # that cld2 may take for one another
CLEAR_SHARE = 0.5


def unlike(language: str, shares: Mapping[str, float]) -> str | None:
    """What is odd about a corpus in `language` of which a sample has these shares; None: nothing.

    `shares`: by the codes of cld2. Nothing is said of languages that it does not know, nor of text that it is unsure of.
    """
    base = re.split("[-_]", language)[0]
    found: Counter[str] = Counter()
    for code, share in shares.items():
        found[ALIASES.get(code, code)] += share  # type: ignore[assignment]
    found.pop("unknown", None)
    if not found or base not in cld2_languages():
        return None
    own = sum(share for code, share in found.items() if ALIKE.get(code, code) == ALIKE.get(base, base))
    other, share = found.most_common(1)[0]
    if own >= CLEAR_SHARE or share < CLEAR_SHARE:
        return None
    return (
        f"language is {language!r}, but of a sample of the text {100 * own:.1f} % are {base} and {100 * share:.1f} % {other}"
    )


def cld2_languages() -> frozenset[str]:
    """The languages that cld2 finds; none when pycld2 is not installed."""
    try:
        import pycld2
    except ImportError:
        return frozenset()
    detected = set(pycld2.DETECTED_LANGUAGES)
    return frozenset(ALIASES.get(code, code) for name, code in pycld2.LANGUAGES if name in detected and code[:3] != "xx-")
