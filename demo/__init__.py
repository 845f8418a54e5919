"""A small model trained by EGPO on a CPU in a few minutes: `python -m demo`."""

import os

# All three are read when torch or transformers is imported, hence here.
# Waiting threads that spin take the cores from working ones when others use the machine too: five times slower steps.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The weights come from an installed package, nothing is fetched.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The GGUF reader's bar has no switch of its own and would break into this demo's progress display.
os.environ.setdefault("TQDM_DISABLE", "1")
