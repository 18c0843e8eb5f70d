"""New rows of embedding and output layer for the tokens of a larger tokenizer, and rows that nobody has trained."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_cpt.checkpoint.hf_tokenizer import TOKENIZER_FILES, load_hf_tokenizer
from megatron_cpt.convert.added_tokens import add_tokens
from megatron_cpt.convert.config import NewRows
from megatron_cpt.model.llama import LlamaConfig
from megatron_cpt.tokenizer.behaviour import PROBES
from megatron_cpt.utils.errors import InputError

logger = logging.getLogger(__name__)

VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
NEAR_ZERO = 0.01  # of the median norm: a row below has hardly been trained
NOISE = 0.1  # standard deviation of the noise on a mean row, of that of its column
ROWS_AT_ONCE = 1 << 12
MOST_IDS = 1 << 24  # of a vocabulary: every id up to the largest has a row


@dataclass(frozen=True)
class Extension:
    """What becomes of the rows of the vocabulary.

    Attributes:
        vocab_size: rows in the end
        new: ids of tokens that the model's own tokenizer does not have -> ids of the tokens it makes of their text
        new_rows: what their rows begin as
        repair: whether other rows near zero become mean rows
        tokenizer: folder of the tokenizer that goes along, None: the model's own
        seed: of the noise
    """

    vocab_size: int
    new: Mapping[int, tuple[int, ...]]
    new_rows: NewRows
    repair: bool
    tokenizer: str | None
    seed: int

    def tokenizer_hash(self) -> str | None:
        """Of the files of the tokenizer that goes along, None: the model's own."""
        if self.tokenizer is None:
            return None
        paths = [os.path.join(self.tokenizer, name) for name in TOKENIZER_FILES]
        contents = [Path(path).read_bytes() for path in paths if os.path.exists(path)]
        return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()


@dataclass(frozen=True)
class RowsReport:
    """Rows of one tensor.

    Attributes:
        added: new tokens' rows; of these from_subtokens are means of the rows of what their text was before
        near_zero: ids of other rows whose norm is below `NEAR_ZERO` of the median
        repaired: whether these were replaced
        median_norm, new_norm: of all rows that were there, and the mean of the new ones
    """

    added: int
    from_subtokens: int
    near_zero: list[int]
    repaired: bool
    median_norm: float
    new_norm: float | None


@contextlib.contextmanager
def extension(
    hf: str,
    llama: LlamaConfig,
    extend_tokenizer: str | None,
    added_tokens: str | None,
    new_rows: NewRows,
    repair: bool,
    seed: int,
) -> Iterator[Extension]:
    """What the options ask for; the tokenizer's folder lasts as long as the block.

    Args:
        extend_tokenizer: HF folder of a tokenizer that has all tokens of the model's own under the same ids, and more
        added_tokens: file with a token on each line, to be added to the model's own tokenizer

    Raises:
        InputError: the new tokenizer is not an extension of the model's
    """
    with tempfile.TemporaryDirectory() as folder:
        if added_tokens is not None:
            extend_tokenizer = folder
            add_tokens(hf, added_tokens, folder, TOKENIZER_FILES)
        if extend_tokenizer is None:
            yield Extension(llama.vocab_size, {}, new_rows, repair, None, seed)
        else:
            new = new_tokens(hf, extend_tokenizer, llama.vocab_size)
            size = max(llama.vocab_size, max(new, default=-1) + 1)
            yield Extension(size, new, new_rows, repair, extend_tokenizer, seed)


def new_tokens(old_folder: str, new_folder: str, rows: int) -> dict[int, tuple[int, ...]]:
    """Ids whose rows have to be made -> ids that the old tokenizer gives their text ((): it has none).

    These are the ids that only the new tokenizer has, and all from `rows` on, the model's own number of rows: some
    tokenizers have tokens, or leave gaps between them, for which their model has no row.

    Raises:
        InputError: a token of the old one has another id in the new one, or nothing is new
    """
    old, new = load_hf_tokenizer(old_folder, quiet=True), load_hf_tokenizer(new_folder, quiet=True)
    old_ids, new_ids = old.get_vocab(), new.get_vocab()
    for token, number in old_ids.items():
        if new_ids.get(token) != number:
            there = f"id {new_ids[token]}" if token in new_ids else "not there"
            raise InputError(f"{new_folder}: token {token!r} is {there}; in {old_folder} it has id {number}; keep all ids")
    known = set(new_ids.values())
    if max(known) >= MOST_IDS:
        raise InputError(f"{new_folder}: a token has the id {max(known)}; expected ids below {MOST_IDS}")
    if known == set(old_ids.values()):
        raise InputError(f"{new_folder} has no token that {old_folder} does not have")
    for text in (text for text in PROBES if "<|" not in text):
        ids = new.encode(text)
        if ids != old.encode(text) and set(ids) <= set(old_ids.values()):
            otherwise = f"splits {text[:40]!r} otherwise than {old_folder}, without a token that is new"
            logger.info(f"note: {new_folder} {otherwise}")
            break
    found: dict[int, tuple[int, ...]] = {}
    for number in sorted((known - set(old_ids.values())) | set(range(rows, max(known) + 1))):
        text = new.decode([number], skip_special_tokens=False) if number in known else ""
        # A part of a character has no text of its own.
        parts = old.encode(text, add_special_tokens=False) if text and "\ufffd" not in text else []
        found[number] = tuple(parts) if max(parts, default=rows) < rows else ()
    return found


class ExtendedTensors(Mapping[str, torch.Tensor]):
    """A model's tensors with the rows of its vocabulary as an extension wants them; one copy of a tensor at a time."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], plan: Extension) -> None:
        self._tensors, self._plan = tensors, plan

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if name not in VOCABULARY_TENSORS or not (self._plan.new or self._plan.repair):
            return tensor
        return extend_rows(tensor, self._plan, near_zero_rows(tensor, self._plan)[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def reports(self) -> dict[str, RowsReport]:
        """Of each tensor with rows of the vocabulary."""
        return {name: report(self._tensors[name], self._plan) for name in VOCABULARY_TENSORS if name in self._tensors}


def row_norms(tensor: torch.Tensor) -> torch.Tensor:
    """fp32 [rows]"""
    return torch.cat([rows.float().norm(dim=1) for rows in tensor.split(ROWS_AT_ONCE)])


def near_zero_rows(tensor: torch.Tensor, plan: Extension) -> tuple[list[int], float]:
    """Ids of rows near zero that are no new token's, and the median norm of all others but the new ones'."""
    norms = row_norms(tensor)
    known = torch.ones(len(norms), dtype=torch.bool)
    known[[number for number in plan.new if number < len(norms)]] = False
    median = norms[known].median().item()
    return torch.nonzero(known & (norms <= NEAR_ZERO * median)).flatten().tolist(), median


def extend_rows(tensor: torch.Tensor, plan: Extension, near_zero: list[int]) -> torch.Tensor:
    """[vocab_size, h]: the rows of [rows, h] with the new and the repaired ones."""
    result = torch.zeros(plan.vocab_size, tensor.shape[1], dtype=tensor.dtype)
    result[: len(tensor)] = tensor
    alive = torch.ones(len(tensor), dtype=torch.bool)
    alive[[number for number in (*near_zero, *plan.new) if number < len(tensor)]] = False
    mean, deviation = moments(tensor, alive)
    generator = torch.Generator().manual_seed(plan.seed)
    for number in near_zero if plan.repair else ():
        result[number] = mean_row(mean, deviation, generator)
    for number, parts in plan.new.items():
        if plan.new_rows == "zero":
            result[number] = 0
        elif plan.new_rows == "subtokens" and parts:
            result[number] = tensor[list(parts)].float().mean(dim=0)
        else:
            result[number] = mean_row(mean, deviation, generator)
    return result


def moments(tensor: torch.Tensor, alive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each column over the rows that count, fp64 [h] each; in parts, to save memory."""
    total = torch.zeros(tensor.shape[1], dtype=torch.float64)
    squares, count = total.clone(), max(int(alive.sum()), 1)
    for rows, chosen in zip(tensor.split(ROWS_AT_ONCE), alive.split(ROWS_AT_ONCE), strict=True):
        values = rows[chosen].double()
        total += values.sum(dim=0)
        squares += values.square().sum(dim=0)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0).sqrt()


def mean_row(mean: torch.Tensor, deviation: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The mean of all rows and a little noise, so that no two tokens stay the same."""
    return mean + NOISE * deviation * torch.randn(len(mean), dtype=torch.float64, generator=generator)


def report(tensor: torch.Tensor, plan: Extension) -> RowsReport:
    """What is done to a tensor's rows."""
    near_zero, median = near_zero_rows(tensor, plan)
    new_norm = None
    if plan.new:
        rows = extend_rows(tensor, dataclasses.replace(plan, repair=False), near_zero)[list(plan.new)]
        new_norm = row_norms(rows).mean().item()
    from_subtokens = sum(bool(parts) for parts in plan.new.values()) if plan.new_rows == "subtokens" else 0
    return RowsReport(len(plan.new), from_subtokens, near_zero, plan.repair and bool(near_zero), median, new_norm)


def replace_tokenizer(source: str, target: str) -> None:
    """Put the tokenizer of one HF folder in the place of another's."""
    for name in TOKENIZER_FILES:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(target, name))
        if os.path.exists(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


def vocabulary_notes(reports: Mapping[str, RowsReport], plan: Extension) -> list[str]:
    """For the person who converts: what was added, what is near zero."""
    lines = []
    for name, rows in reports.items():
        if rows.added:
            kind = f"{rows.from_subtokens} from sub-tokens, " if plan.new_rows == "subtokens" else f"{plan.new_rows}, "
            lines.append(
                f"{name}: {rows.added} new rows ({kind}mean norm {rows.new_norm:.3g}; median of the others "
                f"{rows.median_norm:.3g}), {plan.vocab_size} in all"
            )
        if rows.near_zero:
            done = (
                "are mean rows now"
                if rows.repaired
                else "training may blow up on them; --repair_untrained_embeddings makes them mean rows"
            )
            lines.append(
                f"{name}: {len(rows.near_zero)} rows are near zero (below {NEAR_ZERO:.0%} of the median norm "
                f"{rows.median_norm:.3g}): {show_some_ranges(rows.near_zero)}; {done}"
            )
    return lines


def show_some_ranges(numbers: list[int]) -> str:
    """3, 7-12, ...: at most five of them."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in parts]
    return ", ".join(texts[:5]) + (", ..." if len(texts) > 5 else "")
