"""Operators: what is computed, in torch and in compiled loops."""

import os

# Read when numba is first imported. Through colorama numba would put sys.stdout and sys.stderr back to what they were
# once, for every message it makes while it compiles, and that is done in a thread beside the program.
os.environ.setdefault("NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING", "1")
