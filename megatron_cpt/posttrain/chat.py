"""A conversation in the terminal with a Hugging Face checkpoint; answers appear as they are made."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_cpt.checkpoint.hf_model import load_hf_model
from megatron_cpt.convert.vocabulary import load_hf_tokenizer
from megatron_cpt.model.dtypes import dtype_of
from megatron_cpt.model.hf_folder import check_model, check_positions, most_new_tokens, positions_of_config
from megatron_cpt.platforms.devices import device_type
from megatron_cpt.posttrain.conversations import Message, RowError
from megatron_cpt.posttrain.generate import complete_text, sampling
from megatron_cpt.posttrain.settings import ChatConfig
from megatron_cpt.posttrain.templates import PromptTemplate
from megatron_cpt.posttrain.turn_end import turn_end
from megatron_cpt.utils.console import counted
from megatron_cpt.utils.errors import InputError

HELP = """/system TEXT  begin anew with another system prompt (no TEXT: with none)
/new          begin anew
/undo         take the last question and answer back
/help         this
/quit         leave (or Ctrl-D); Ctrl-C ends an answer"""


class Speaker:
    """A model that answers, piece by piece.

    Attributes:
        tokens, seconds: of the last answer, and how long it took
        cut_off: whether it has reached max_new_tokens without an end
        end: where an answer ends
    """

    def __init__(self, config: ChatConfig) -> None:
        """Load it.

        Raises:
            InputError: it cannot be read, or has no chat template
        """
        import transformers

        check_model(config.model)
        if config.max_new_tokens is not None:
            check_positions(config.model, config.max_new_tokens)
        transformers.utils.logging.disable_progress_bar()
        self.template = PromptTemplate(load_hf_tokenizer(config.model), config.chat_template)
        model = load_hf_model(config.model, dtype=dtype_of(config.dtype) if config.dtype else "auto")
        self._model: Any = model.to(device_type()).eval()
        self._config = config
        self._positions = positions_of_config(self._model.config)
        self._new_tokens = config.max_new_tokens or most_new_tokens(self._positions)
        check_positions(config.model, self._new_tokens, self._positions)  # config.json need not name them
        self.end = turn_end(self.template.tokenizer, self._model.generation_config)
        self._model.generation_config = transformers.GenerationConfig()  # ChatConfig says how, not the model's folder
        self.tokens, self.seconds, self.cut_off = 0, 0.0, False
        self._generator_seed = config.seed

    def room(self) -> float:
        """Tokens that a prompt may have."""
        return self._positions - self._new_tokens

    def count(self, messages: list[Message]) -> int:
        """Tokens of a prompt."""
        return len(self.template.tokenizer.encode(self.template.prompt(messages), add_special_tokens=False))

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """The pieces of the answer; closing the iterator ends it."""
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        config, tokenizer = self._config, self.template.tokenizer
        prompt = tokenizer(self.template.prompt(messages), add_special_tokens=False, return_tensors="pt").to(
            self._model.device
        )
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ended = threading.Event()
        self.tokens, self.cut_off, began = 0, False, time.monotonic()
        stops = self.end.criterion(tokenizer, prompt["input_ids"].shape[1])
        if self._generator_seed is not None:
            torch.manual_seed(self._generator_seed)
            self._generator_seed += 1

        def watch(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.tokens += 1
            at_end = stops(ids, scores)
            self.cut_off = self.tokens == self._new_tokens and int(ids[0, -1]) not in ends and not bool(at_end.all())
            return at_end | ended.is_set()

        ends, padding = list(self.end.token_ids), tokenizer.pad_token_id
        options = {
            **prompt,
            **sampling(config.temperature_used(), config.top_p),
            "max_new_tokens": self._new_tokens,
            "repetition_penalty": config.penalty_used(),
            "eos_token_id": ends or None,
            "pad_token_id": padding if padding is not None else next(iter(ends), 0),
            "stopping_criteria": StoppingCriteriaList([watch]),
            "streamer": streamer,
        }
        failed: list[BaseException] = []

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self._model.generate(**options)
            except BaseException as error:  # raised again where the pieces are read
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=generate)
        thread.start()
        try:
            yield from self.end.cut_stream(streamer)
        finally:
            ended.set()
            thread.join()
            self.seconds = time.monotonic() - began
        if failed:
            raise failed[0]


@dataclass
class Chat:
    """What was said so far, and what the commands do to it."""

    speaker: Speaker
    system: str | None
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """The system prompt and the turns that leave room for an answer, the last ones.

        Raises:
            InputError: the last question alone is too long
        """
        system = [Message("system", self.system)] if self.system else []
        first = 0
        while self.speaker.count([*system, *self.turns[first:]]) > self.speaker.room():
            first += 2
            if first >= len(self.turns):
                raise InputError(
                    f"the question has more than {self.speaker.room():.0f} tokens, the room that the model leaves for it"
                )
        if first:
            print(f"[the first {first} turns no longer fit and are left out]", file=sys.stderr)
        return [*system, *self.turns[first:]]

    def command(self, line: str) -> bool:
        """Do what a line that begins with / says; whether to go on."""
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        if name == "/system":
            self.system, self.turns = rest.strip() or None, []
        elif name == "/new":
            self.turns = []
        elif name == "/undo":
            del self.turns[-2:]
        else:
            print(HELP, file=sys.stderr)
        return True

    def say(self, text: str) -> None:
        """Ask, and print the answer as it comes."""
        self.turns.append(Message("user", text))
        pieces: list[str] = []
        try:
            stream = self.speaker.answer(self.messages())
        except (InputError, RowError) as error:  # too long, or refused by the template
            self.turns.pop()
            print(f"error: {error}", file=sys.stderr)
            return
        try:
            for piece in stream:
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stream.close()  # type: ignore[attr-defined]
        print()
        speed = self.speaker.tokens / max(self.speaker.seconds, 1e-9)
        cut_off = "; cut off at max_new_tokens" if self.speaker.cut_off else ""
        print(f"[{counted(self.speaker.tokens, 'token')}, {speed:.1f} tokens/s{cut_off}]", file=sys.stderr)
        self.turns.append(Message("assistant", "".join(pieces)))


def chat(config: ChatConfig) -> str | None:
    """Read questions until the end of the input; or return the prompts with what completes them, a paragraph each."""
    if config.prompt is not None:
        texts = complete_text(
            config.model,
            config.prompts(),
            config.max_new_tokens,
            temperature=config.temperature_used(),
            top_p=config.top_p,
            repetition_penalty=config.penalty_used(),
            seed=config.seed,
            dtype=dtype_of(config.dtype) if config.dtype else "auto",
        )
        return "\n\n".join(prompt + text for prompt, text in zip(config.prompts(), texts, strict=True))
    if sys.stdin is None:
        raise InputError("stdin is closed; expected a terminal, or questions on it")
    talk = Chat(Speaker(config), config.system)
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # tokenizers take no bytes that are not UTF-8
    if interactive:
        import readline  # noqa: F401  (input() gets history and editing from it)

        print(f"{config.model}: type a question, /help for commands", file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            print(file=sys.stderr)
            continue
        if line.startswith("/"):
            if not talk.command(line):
                return None
        elif line.strip():
            talk.say(line)
