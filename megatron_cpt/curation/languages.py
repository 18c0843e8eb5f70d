# mypy: disable-error-code="import-untyped, import-not-found"
"""What is known about a language: its word tokenizer in datatrove, the codes of the identifiers, and thresholds that fit.

Two-letter codes must not be given to datatrove 0.10 as they are: it reads FALSE in its table of tokenizers as true, so that
"zh" gets a tokenizer that splits at spaces, and Chinese has none. The full names of the table (`cmn_Hani`) are not affected.
"""

from __future__ import annotations

import csv
import importlib.resources
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.corpus.language_check import cld2_languages
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.input_files import load_yaml, plain_number

FILTERS = ("gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality")  # in the order of FineWeb
WORD_TOKENIZERS = {"no": "nob_Latn", "tl": "fil_Latn"}  # codes that datatrove's table does not have
WITHOUT_SPACES = frozenset(("bo", "dz", "ja", "km", "lo", "my", "th", "wuu", "yue", "zh"))
LID_176 = (  # the labels of fastText's lid.176
    "af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da de "
    "diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id ie "
    "ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr "
    "mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah "
    "sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu "
    "xal xmf yi yo yue zh"
)

Arguments = dict[str, dict[str, Any]]  # {filter: {argument: value}}

DEFAULT_SCORE = 0.65
"""What a document's language has to score when nothing else is known: FineWeb's threshold."""


@cache
def published_thresholds() -> dict[str, dict[str, Any]]:
    """FineWeb2's thresholds of some languages, by names as in `deu_Latn`."""
    file = importlib.resources.files("megatron_cpt.curation").joinpath("fineweb2_thresholds.yaml")
    found: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


@cache
def word_tokenizer_name(language: str) -> str:
    """ISO 639 code -> name of the word tokenizer in datatrove, as in `cmn_Hani`. InputError: datatrove has none."""
    if language in WORD_TOKENIZERS:
        return WORD_TOKENIZERS[language]
    table = importlib.resources.files("datatrove") / "assets" / "tokenizer_assignment.csv"
    with table.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            named = row["code_3"] == language or (row["code_1"] == language and row["default_code_1"] == "TRUE")
            if named and row["default_script"] == "TRUE" and row["type"]:
                return f"{row['code_3']}_{row['script']}"
    raise InputError(
        f"keep_languages: found {language!r}, for which datatrove has no word tokenizer; expected an ISO 639 code"
    )


def identifiable(identifier: str) -> frozenset[str] | None:
    """Languages an identifier can name; None: all that have a name. InputError: its library is missing."""
    if identifier == "glotlid":
        return None
    if identifier != "cld2":
        return frozenset(LID_176.split())
    known = cld2_languages()
    if not known:
        raise InputError("language_identifier cld2 needs pycld2; expected: pip install pycld2, or another identifier")
    return known


def check_languages(languages: list[str], identifier: str) -> None:
    """InputError for a language the identifier cannot find or datatrove cannot split into words."""
    known = identifiable(identifier)
    for language in languages:
        if known is not None and language not in known:
            wanted = " ".join(sorted(known))
            raise InputError(
                f"keep_languages: found {language!r}, which {identifier} does not identify; expected some of {wanted}"
            )
        word_tokenizer_name(language)
        if language == "ja" and importlib.util.find_spec("sudachipy") is None:  # the one library datatrove does not check
            raise InputError("keep_languages: ja needs sudachipy; expected: pip install sudachipy sudachidict_core")


def language_scores(languages: list[str], identifier: str, given: float | None) -> dict[str, float]:
    """The smallest score with which a document of each language is kept."""
    if given is not None or identifier != "glotlid":
        return dict.fromkeys(languages, DEFAULT_SCORE if given is None else given)
    published = published_thresholds()  # of GlotLID's probabilities
    return {code: published.get(word_tokenizer_name(code), {}).get("language_score", DEFAULT_SCORE) for code in languages}


def default_arguments(language: str) -> Arguments:
    """FineWeb2's thresholds; for other languages datatrove's, where these, made for English, suit `language` at all."""
    if language == "en":
        return {}
    arguments: Arguments = {"gopher_quality": {"min_stop_words": 0}}  # the list is English: the, be, to, of, ...
    if language in WITHOUT_SPACES:
        # Words have one or two characters; lines are shorter; C4 splits lines at spaces and ends them with . ! or ?
        arguments["gopher_quality"]["min_avg_word_length"] = 0
        arguments["fineweb_quality"] = {"short_line_thr": 1.0}
        arguments["c4_quality"] = {"min_words_per_line": -1, "max_word_length": -1, "filter_no_terminal_punct": False}
    published = published_thresholds().get(word_tokenizer_name(language))
    return merge_counts(arguments, _arguments_of(published)) if published else arguments


def fineweb2_arguments(folder: str, language: str) -> Arguments:
    """FineWeb2's thresholds of a language, used as its pipeline uses them. InputError: no such file, or not of that form."""
    path = Path(folder).expanduser() / f"{word_tokenizer_name(language)}.yml"
    try:
        if not path.exists():
            raise InputError(f"fineweb2_configs: found no {path}; expected the file of {language}")
        given = load_yaml(path, "fineweb2_configs", plain_number)
        stop_words = {"gopher_quality": {"stop_words": given["stopwords"], "min_stop_words": 2}}
        return merge_counts(_arguments_of(given), stop_words)
    except (KeyError, TypeError) as error:
        raise InputError(f"fineweb2_configs {path}: not a file of FineWeb2 ({error})") from None


def _arguments_of(thresholds: dict[str, Any]) -> Arguments:
    """Thresholds as the configurations of FineWeb2 have them, but for stop words, as its pipeline uses them."""
    off = {"dup_para_frac": 0, "dup_line_char_frac": 0, "dup_para_char_frac": 0}
    names = {
        "gopher_repetition": ("dup_line_frac", "top_n_grams", "dup_n_grams"),
        "gopher_quality": ("min_avg_word_length", "max_avg_word_length", "max_non_alpha_words_ratio"),
        "fineweb_quality": ("line_punct_thr", "new_line_ratio"),
    }
    given = {step: {name: thresholds[name] for name in own} for step, own in names.items()}
    return merge_counts(
        {"gopher_repetition": off, "fineweb_quality": {"short_line_thr": 999, "char_duplicates_ratio": 0.1}}, given
    )


def merge_counts(first: Arguments, second: Arguments) -> Arguments:
    """Both; where they differ, the second."""
    return {name: first.get(name, {}) | second.get(name, {}) for name in first.keys() | second.keys()}
