"""What tools/import_corpus.py was called in the last release."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    print(
        "note: adopt_corpus.py is now called import_corpus.py; the old name is accepted until the next release",
        file=sys.stderr,
    )
    runpy.run_path(str(Path(__file__).with_name("import_corpus.py")), run_name="__main__")
