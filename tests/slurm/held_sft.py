"""tools/finetune_sft.py that waits at the end of step HELD until it is told to stop."""

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent

if __name__ == "__main__":
    from megatron_cpt.posttrain.runner import Stop

    sys.path.insert(0, str(TESTS))
    from tampering import note

    real = Stop.on_step_end

    def on_step_end(self: Stop, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        if state.global_step == int(os.environ["HELD"]):
            note(os.environ["SIGN"])
            while self.asked is None:
                time.sleep(0.1)
        return real(self, args, state, control, **rest)

    Stop.on_step_end = on_step_end  # type: ignore[method-assign]
    runpy.run_path(str(TESTS.parent / "tools" / "finetune_sft.py"), run_name="__main__")
