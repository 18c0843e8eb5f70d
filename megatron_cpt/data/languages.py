"""Names of languages: which codes there are, and whether a text is in the language it is said to be in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from megatron_cpt.errors import InputError

_TWO_LETTERS = (
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el "
    "en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu "
    "ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na "
    "nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn "
    "so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu "
)
ISO_639_1 = frozenset(_TWO_LETTERS.split())
ALIASES = {"zh-Hant": "zh", "iw": "he", "jw": "jv", "un": "unknown"}  # codes of cld2 -> codes of everybody else
ALIKE = {"nb": "no", "nn": "no", "sh": "sr", "hr": "sr", "bs": "sr", "ms": "id"}  # that cld2 may take for one another
CLEAR_SHARE = 0.5


def check_language(language: str) -> None:
    """InputError when a language is none: a code of two letters that ISO 639 does not have, or no name at all.

    Longer names are taken as they are: codes of three letters, and what is no language, as `code`.
    """
    base = re.split("[-_]", language)[0]
    if len(base) < 2 or (len(base) == 2 and base not in ISO_639_1):
        raise InputError(f"language is {language!r}; wanted an ISO 639 code, as in zh, or a longer name, as in code")


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
