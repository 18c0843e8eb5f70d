"""What curated files were made from, so that a validation set from the same raw files is noticed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import orjson

from megatron_cpt.corpus.manifest import CorpusManifest
from megatron_cpt.corpus.sources import Source, printable

MAX_DEFAULT_TASKS = 1000


def number_of_tasks(tasks: int | None, files: int) -> int:
    """Into how many tasks a curation is cut; task i reads the files i, i + tasks, ... and writes one file a language."""
    return tasks or min(files, MAX_DEFAULT_TASKS)


def origins(sources: Iterable[Source]) -> dict[str, list[str]]:
    """{a curation: the raw files}, for those of `sources` that lie in the output folder of one."""
    found: dict[str, dict[str, None]] = {}
    for source in sources:
        config = Path(source.url).parent.parent / ".curation" / "config.json"
        number = os.path.basename(source.url).split(".")[0]
        if not source.is_local or not number.isdecimal() or not config.exists():
            continue
        content = config.read_bytes()
        settings = orjson.loads(content)
        files = [printable(str(file[0])) for file in settings["input"]]
        its_own = files[int(number) :: number_of_tasks(settings["tasks"], len(files))]
        found.setdefault(hashlib.sha256(content).hexdigest()[:16], {}).update(dict.fromkeys(its_own))
    return {curation: list(files) for curation, files in found.items()}


def common_origin(ours: CorpusManifest, theirs: CorpusManifest) -> str | None:
    """A raw file that two corpora were made from, at least one through a curation; None: there is none.

    Two files that one curation wrote share no document, nor do two curations of different languages.
    """
    direct = [{source.path for source in manifest.sources if source.documents} for manifest in (ours, theirs)]
    for mine, other, its_files in ((ours, theirs, direct[1]), (theirs, ours, direct[0])):
        for curation, files in mine.origins.items():
            others = set(its_files)
            if mine.language == other.language:
                others |= {file for name, some in other.origins.items() if name != curation for file in some}
            for file in files:
                if file in others:
                    return file
    return None
