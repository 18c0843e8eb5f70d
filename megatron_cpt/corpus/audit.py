"""A helper process that checks on the side: the fast tokenizer against its reference, and the input files' checksums.

It loads the reference tokenizer while the main process loads the fast one. Nothing is published before it has agreed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.corpus.manifest import TokenizerInfo
from megatron_cpt.corpus.sources import sha256_file
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer
from megatron_cpt.utils.errors import ProcessDiedError
from megatron_cpt.utils.worker_pool import Worker, start_worker, stop_workers

ODD_TEXTS = (
    "",
    " ",
    "plain words, 12345 numbers and  two   spaces",
    "don't we'll I'M YOU'RE ſ'ſ",
    "\x00\x01\x7f\u0085 controls",
    "tabs\t\t and\r\nlines\r\r\n\n \n  indented",
    "中文，没有空格。繁體字與标点！",
    "日本語とかな 한국어 ไทย हिन्दी العربية עברית",
    "e\u0301\u0301 u\u0308 \u200d\u200b\ufeff \u2028 \u00a0",
    "👨‍👩‍👧‍👦 🇨🇳 \U000e0001 \U0010fffd",
    "½ ⅷ ٣٤٥ ४५ 一二三 1234567890",
    "ﬁ ﷺ ｆｕｌｌ　ｗｉｄｔｈ İıſK",
    "<|begin_of_text|><|end_of_text|> <s></s> <unk> [INST] <|endoftext|> <|im_start|>",
    "def f(x):\n\treturn {'a': [x**2, -1e-5]}  # comment\n",
    "https://example.org/?q=%20&x=1#frag  user@example.org",
    " " * 300 + "x" * 300 + "\n" * 40 + "哈" * 300,
)
"""Compared before anything else: what tokenizers are known to disagree on."""

MOST_ON_THE_WAY = 64


class TokenizerMismatchError(Exception):
    """The fast tokenizer gives other ids than the reference."""


class _Auditor:
    """Lives in the helper process: answers (method, argument)."""

    def __init__(self, path: str, eos_token: str | None) -> None:
        self._path, self._eos_token = path, eos_token
        self._tokenizer: Tokenizer | None = None
        self._checksums: dict[str, str | None] = {}
        self._hashing: threading.Thread | None = None

    def __call__(self, request: tuple[str, Any]) -> Any:
        method, argument = request
        return getattr(self, method)(argument)

    def _reference(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._path, self._eos_token)
        return self._tokenizer

    def facts(self, _: None) -> TokenizerInfo:
        """Load the reference tokenizer and ask it."""
        return TokenizerInfo.of(self._path, self._reference())

    def compare(self, sample: list[tuple[str, npt.NDArray[Any]]]) -> str | None:
        """What differs from the reference, or None."""
        reference = self._reference().encode_batch([text for text, _ in sample])
        for (text, ids), wanted in zip(sample, reference, strict=True):
            if not np.array_equal(ids, np.asarray(wanted, dtype=np.int64)):
                return f"{text[:80]!r}: gigatoken gives {ids[:12].tolist()}, the reference {wanted[:12]}"
        return None

    def hash(self, paths: list[str]) -> None:
        """Begin to compute the checksums of files, one after the other."""
        self._hashing = threading.Thread(target=self._hash, args=(paths,), daemon=True)
        self._hashing.start()

    def _hash(self, paths: list[str]) -> None:
        for path in paths:
            try:
                self._checksums[path] = sha256_file(path)
            except OSError:
                self._checksums[path] = None

    def checksums(self, _: None) -> dict[str, str | None]:
        """All checksums that were asked for; None: the file is gone."""
        if self._hashing is not None:
            self._hashing.join()
        return self._checksums


class Audit:
    """The main process's side: requests go out at once, answers are taken in order, when they are there or are needed.

    Close it when done; it is a context manager. All methods may raise ProcessDiedError, and TokenizerMismatchError for a
    sample that was given before.
    """

    def __init__(self, tokenizer: str, eos_token: str | None) -> None:
        self._worker: Worker[tuple[str, Any], Any] = start_worker(_Auditor(tokenizer, eos_token))
        self._expected: deque[str] = deque()
        self._answers: dict[str, Any] = {}

    def __enter__(self) -> Audit:
        return self

    def __exit__(self, *_: object) -> None:
        stop_workers([self._worker])

    def _ask(self, method: str, argument: Any = None) -> None:
        try:
            self._worker.connection.send((method, argument))
        except OSError:
            raise _died() from None
        self._expected.append(method)

    def _take(self) -> None:
        """The next answer."""
        method = self._expected.popleft()
        try:
            error, result, _ = self._worker.connection.recv()
        except (EOFError, OSError):
            raise _died() from None
        if error is not None:
            raise error
        if method == "compare" and result is not None:
            raise TokenizerMismatchError(result)
        self._answers[method] = result

    def _answer_to(self, method: str) -> Any:
        while method not in self._answers:
            self._take()
        return self._answers[method]

    def ask_facts(self) -> None:
        """Begin to load the reference tokenizer."""
        self._ask("facts")

    def facts(self) -> TokenizerInfo:
        """What was asked for with `ask_facts`. InputError: it is no good tokenizer."""
        facts: TokenizerInfo = self._answer_to("facts")
        return facts

    def compare(self, sample: Sequence[tuple[str, npt.NDArray[Any]]]) -> None:
        """Give texts and ids to compare with the reference."""
        self._ask("compare", list(sample))
        # few on the way: the reference may be slower than all workers together
        while self._expected and (self._worker.connection.poll() or len(self._expected) > MOST_ON_THE_WAY):
            self._take()

    def settle(self) -> None:
        """Wait until everything given so far is checked."""
        while self._expected:
            self._take()

    def hash(self, paths: list[str]) -> None:
        """Begin to compute the checksums of local files, beside everything else; to be called once."""
        self._ask("hash", paths)

    def checksums(self) -> dict[str, str | None]:
        """{path: sha256} of all files given to `hash`."""
        self._ask("checksums")
        found: dict[str, str | None] = self._answer_to("checksums")
        return found


def _died() -> ProcessDiedError:
    return ProcessDiedError("the checking process was killed (out of memory?)")
