"""tests/tampered_tool.py until the run in SAVE has a checkpoint of step TAMPER_UNTIL; from then on the tool as it is."""

import os
import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent

if __name__ == "__main__":
    newest = Path(os.environ["SAVE"]) / "latest_checkpointed_iteration.txt"
    if newest.exists() and int(newest.read_text()) >= int(os.environ["TAMPER_UNTIL"]):
        del os.environ["TAMPER"]
    sys.path.insert(0, str(TESTS))
    runpy.run_path(str(TESTS / "tampered_tool.py"), run_name="__main__")
