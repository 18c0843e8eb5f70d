"""Taking secrets out of text that goes on screen or into files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

REDACTED = "[redacted]"
SHORTEST = 8  # of a secret in the environment: a shorter value may be an ordinary word
SECRET_NAME = re.compile(r"(^|_)TOKEN(_|$)|SECRET|PASSW|JWT|(^|_)(API_?)?KEY(_|$)", re.IGNORECASE)
AUTHORIZATION = re.compile(r"(?i)\b(bearer|basic)(\s+)[\w.~+/=-]{6,}")
API_KEY = re.compile(r"(?i)\b(api[-_ ]?key\b[\"']?\s*[:=]\s*[\"']?)[^\s\"',;&}]{6,}")
CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without these secrets, without `Bearer ...` and `api_key=...`, and without names and passwords in URLs."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, REDACTED)
    text = AUTHORIZATION.sub(rf"\1\2{REDACTED}", text)
    text = API_KEY.sub(rf"\1{REDACTED}", text)
    return CREDENTIALS.sub(f"{REDACTED}@", text)


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Values of the variables whose names say that they are secret (HF_TOKEN, WANDB_API_KEY), the longest first.

    Paths are left out: they are the places of secrets, and belong into messages.
    """
    named = [value for name, value in environment.items() if SECRET_NAME.search(name)]
    return sorted((value for value in named if len(value) >= SHORTEST and value[0] not in "/.~"), key=len, reverse=True)
