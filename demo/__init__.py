"""A small model trained by EGPO on a CPU in a few minutes: `python -m demo`."""

import os

# Read when transformers is imported, hence here: the weights come from an installed package, nothing is fetched.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The GGUF reader's bar has no switch of its own and would break into this demo's progress display.
os.environ.setdefault("TQDM_DISABLE", "1")
