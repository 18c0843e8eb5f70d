"""tools/pretrain_cpt.py after `tampering.tamper` of what the variable TAMPER says: for runs as processes of their own."""

import runpy
from pathlib import Path

from tampering import tamper, wishes_of_environment

TOOL = str(Path(__file__).parent.parent / "tools" / "pretrain_cpt.py")

if __name__ == "__main__":
    tamper(wishes_of_environment())
    runpy.run_path(TOOL, run_name="__main__")
