"""What answers are worth. All scores are between 0 and 1, those of BLEU and chrF, too."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from megatron_cpt.evaluation import sandbox

# What CMRC 2018's evaluation leaves out; the ellipsis of two characters that it lists never equals one character.
PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
HAN = re.compile("[\u4e00-\u9fa5]")

Pair = tuple[str, str]  # reference, prediction


class Characters:
    """rouge_score's tokenizer for text without spaces between words: its own drops all but Latin letters and digits."""

    def tokenize(self, text: str) -> list[str]:
        """All characters but spaces."""
        return list("".join(text.lower().split()))


@functools.cache
def rouge_scorer() -> Any:
    """Of characters."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Characters())


def rouge(reference: str, prediction: str) -> dict[str, float]:
    """F-measures."""
    return {name: float(score.fmeasure) for name, score in rouge_scorer().score(reference, prediction).items()}


def rouge_summary(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """LCSTS: ROUGE on characters."""
    return rouge(doc["summary"], results[0])


def answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """BelleEval: ROUGE-L with the answer that is given."""
    return {"rougeL": rouge(doc["std_answer"], results[0])["rougeL"]}


def extraction(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """CMRC 2018, and DRCD in the same way: the best of all answers."""
    references, prediction = doc["answers"]["text"], results[0]
    return {
        "exact_match": max(float(bare(reference) == bare(prediction)) for reference in references),
        "f1": max(common_f1(segments(reference), segments(prediction)) for reference in references),
    }


def bare(text: str) -> str:
    """Lower case, without punctuation."""
    return "".join(character for character in text.lower().strip() if character not in PUNCTUATION)


def segments(text: str) -> list[str]:
    """Chinese characters, and words of what is between them, without punctuation."""
    from nltk.tokenize import word_tokenize

    found, between = [], ""
    for character in bare(text):
        if HAN.match(character):
            # The official evaluation splits sentences first, which needs data of nltk's to be downloaded, and changes
            # words only where a full stop of Latin script is followed by another sentence.
            found += [*word_tokenize(between, preserve_line=True), character]
            between = ""
        else:
            between += character
    return found + word_tokenize(between, preserve_line=True)


def common_f1(reference: Sequence[str], prediction: Sequence[str]) -> float:
    """Of the longest run of segments that both have."""
    common = SequenceMatcher(None, reference, prediction, autojunk=False).find_longest_match().size
    return 2 * common / (len(reference) + len(prediction)) if common else 0.0


def translation(doc: dict[str, Any], results: list[str]) -> dict[str, Pair]:
    """WMT22: what the metrics of the whole corpus are computed from."""
    pair = (doc["target"], results[0].strip())
    return {"bleu": pair, "chrf": pair}


def bleu_zh(pairs: Sequence[Pair]) -> float:
    """Into Chinese: of characters."""
    return corpus_bleu(pairs, "zh")


def bleu_en(pairs: Sequence[Pair]) -> float:
    """Into English."""
    return corpus_bleu(pairs, "13a")


def corpus_bleu(pairs: Sequence[Pair], tokenizer: str) -> float:
    """As sacrebleu has it, over 100."""
    import sacrebleu

    references, predictions = zip(*pairs, strict=True)
    return float(sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenizer).score) / 100


def corpus_chrf(pairs: Sequence[Pair]) -> float:
    """As sacrebleu has it, over 100."""
    import sacrebleu

    references, predictions = zip(*pairs, strict=True)
    return float(sacrebleu.corpus_chrf(predictions, [references]).score) / 100


def code(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """HumanEval: whether the function passes its tests, in a process with limits."""
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})"
    return {"pass@1": float(sandbox.run_program(program, sandbox.SandboxLimits()).passed)}
