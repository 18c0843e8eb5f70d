"""A model that judges pairs of answers, behind an OpenAI-compatible endpoint. Nothing is asked twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from megatron_cpt.evaluation.config import JudgeConfig
from megatron_cpt.evaluation.votes import Outcome
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.redaction import redacted

Letter = Literal["A", "B", "C"]

# After the pairwise prompt of MT-Bench (Zheng et al. 2023), with a sentence on the language of the answer.
JUDGE_PROMPT = """\
Act as an impartial judge of two answers that AI assistants have given to the question of a user. Choose the assistant that
follows the user's instructions and answers the question better: consider helpfulness, relevance, accuracy, depth and level
of detail. An answer in another language than the question's is worse unless the user asked for that language. Do not let
the order of the answers, their length or the names of the assistants influence you. Explain your choice in a few sentences,
then end with exactly one of [[A]] (assistant A is better), [[B]] (assistant B is better) or [[C]] (a tie).

[Question of the user]
{question}

[Answer of assistant A]
{answer_a}

[Answer of assistant B]
{answer_b}
"""
PLACES = ("question", "answer_a", "answer_b")
VERDICT = re.compile(r"\[\[([ABC])\]\]")
RETRIES = 4  # of a request that gets no answer, or one of an overloaded server; with growing pauses


class JudgeError(RuntimeError):
    """The judge gives no answers; the text says why."""


@dataclass(frozen=True)
class PairVerdict:
    """Both verdicts on one pair of answers, of the first answer shown as A and as B; None: what it said is no verdict."""

    as_a: Letter | None
    as_b: Letter | None

    @property
    def parsed(self) -> bool:
        """Whether both are verdicts."""
        return self.as_a is not None and self.as_b is not None

    @property
    def consistent(self) -> bool:
        """Whether both say the same of the answers, in whatever order they are shown."""
        return (self.as_a, self.as_b) in (("A", "B"), ("B", "A"), ("C", "C"))

    @property
    def outcome(self) -> Outcome:
        """Of the first answer: a win or a loss only where both orders say so."""
        outcomes: dict[tuple[Letter | None, Letter | None], Outcome] = {("A", "B"): "win", ("B", "A"): "loss"}
        return outcomes.get((self.as_a, self.as_b), "tie")


class Judge:
    """Asks, and remembers."""

    def __init__(self, config: JudgeConfig, path: str) -> None:
        """`path`: the file that verdicts are kept in.

        Raises:
            InputError: openai is not installed, the API key is not set, or the prompt has no place for what is judged
        """
        try:
            import openai
        except ImportError as error:
            raise InputError("a judge needs openai; expected: pip install 'megatron-cpt[eval]'") from error
        self._config, self._path = config, path
        self._prompt = read_prompt(config.prompt)
        self._client = openai.OpenAI(
            base_url=config.url, api_key=api_key(config.api_key_env), max_retries=RETRIES, timeout=config.timeout
        )
        self._key = None if config.api_key_env is None else api_key(config.api_key_env)
        self._said = read_said(path)
        self._lock = threading.Lock()
        self._gone: JudgeError | None = None  # once all tries of a request have had no answer

    def verdicts(self, pairs: Sequence[tuple[str, str, str]]) -> list[PairVerdict]:
        """On each (question, first answer, second answer), asked in both orders.

        Raises:
            JudgeError: the endpoint cannot be reached, now or at the last call, or refuses; what it has said so far is kept
        """
        with ThreadPoolExecutor(self._config.parallel) as pool:
            return list(pool.map(lambda pair: self._judge(*pair), pairs))

    def _judge(self, question: str, first: str, second: str) -> PairVerdict:
        if first == second:
            return PairVerdict("C", "C")  # there is nothing to ask
        return PairVerdict(
            parse_verdict(self._ask(question, first, second)), parse_verdict(self._ask(question, second, first))
        )

    def _ask(self, question: str, answer_a: str, answer_b: str) -> str:
        """What the judge says, now or in an earlier run."""
        texts = {"question": question, "answer_a": answer_a, "answer_b": answer_b}
        prompt = filled(self._prompt, texts)
        judge = {"url": self._config.url, "model": self._config.model}
        key = hashlib.sha256(json.dumps([judge, prompt]).encode()).hexdigest()
        if key not in self._said:
            said = self._complete(prompt)
            with self._lock:
                self._said[key] = said
                append_line(
                    self._path, {"key": key, "judge": judge} | texts | {"said": said, "verdict": parse_verdict(said)}
                )
        return self._said[key]

    def _complete(self, prompt: str) -> str:
        import openai

        if self._gone is not None:
            raise self._gone  # each further request would wait as long
        begin = time.monotonic()
        try:
            found = self._client.chat.completions.create(
                model=str(self._config.model), messages=[{"role": "user", "content": prompt}], temperature=0.0
            )
        except openai.APIConnectionError as error:
            tried = f"asked {RETRIES + 1} times for a verdict, each time for up to {self._config.timeout:g} s"
            passed = f"{time.monotonic() - begin:.0f} s in all"
            answer = f"without an answer: {self._without_key(error)}"
            self._gone = JudgeError(f"{self._config.url}: {tried} (pairwise.judge.timeout), {passed}, {answer}")
            raise self._gone from None  # the causes may hold the request, with the key
        except openai.OpenAIError as error:
            raise JudgeError(f"{self._config.url}: {self._without_key(error)[:200]}") from None
        except ValueError:  # openai passes on what json says of an answer that is none
            found = None
        said = completion_text(found)
        if said is None:
            raise JudgeError(
                f"{self._config.url} answers with no chat completion; expected the URL of an OpenAI-compatible API"
            )
        return self._without_key(said)

    def _without_key(self, text: object) -> str:
        """What the server or an error says, without the key that it may repeat."""
        if isinstance(text, Exception):
            text = " ".join(str(text).split())
        return redacted(str(text), [self._key] if self._key is not None else [])


def completion_text(completion: Any) -> str | None:
    """What a chat completion says, "" if nothing; None: it is none, as openai checks no types."""
    try:
        content = completion.choices[0].message.content
    except (AttributeError, LookupError, TypeError):
        return None
    return content if isinstance(content, str) else "" if content is None else None


def parse_verdict(said: str) -> Letter | None:
    """The verdict, if there is exactly one."""
    found = set(VERDICT.findall(said))
    return found.pop() if len(found) == 1 else None


def filled(prompt: str, texts: Mapping[str, str]) -> str:
    """All places at once, so that a text that holds the name of another place stays as it is."""
    return re.sub("{(" + "|".join(PLACES) + ")}", lambda match: texts[match[1]], prompt)


def read_prompt(path: str | None) -> str:
    """The file's, or JUDGE_PROMPT.

    Raises:
        InputError: there is no such file, or no place for something in it
    """
    if path is None:
        return JUDGE_PROMPT
    if not os.path.isfile(path):
        raise InputError(f"pairwise.judge.prompt is {path}; no such file")
    with open(path, encoding="utf-8") as file:
        try:
            prompt = file.read()
        except UnicodeDecodeError as error:
            raise InputError(f"pairwise.judge.prompt is {path}, which is no text in UTF-8: {error}") from error
    missing = [f"{{{name}}}" for name in PLACES if f"{{{name}}}" not in prompt]
    if missing:
        raise InputError(f"{path} has no {', '.join(missing)}; expected a place for the question and both answers")
    return prompt


def api_key(name: str | None) -> str:
    """From the environment; servers of one's own take any.

    Raises:
        InputError: the variable is not set, or what it holds cannot be sent in a header
    """
    if name is None:
        return "none"
    if not os.environ.get(name):
        raise InputError(f"pairwise.judge.api_key_env is {name}, which is not set; expected an environment variable")
    key = os.environ[name].strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"pairwise.judge.api_key_env is {name}, whose value is no key; expected letters, digits and signs")
    return key


def read_said(path: str) -> dict[str, str]:
    """What was said in earlier runs. A line that a kill has cut off, or that is no row, is left out, and so asked again."""
    said = {}
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    row = json.loads(line)
                    said[str(row["key"])] = str(row["said"])
    return said


def append_line(path: str, row: Mapping[str, Any]) -> None:
    """To a JSON Lines file; a line that was cut off is ended first."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode(errors="replace"))  # JSON may hold halves of characters
