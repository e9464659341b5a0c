"""The forms of a weight that compiled loops multiply with, and how its numbers lie."""

LANES = 8
"""Numbers in a vector. Rows of every weight must be whole vectors."""
FLOAT32, BFLOAT16, INT8, PANELS, INT4 = 0, 1, 2, 3, 4
"""Forms of a weight: float32 as it is; in panels (`ops.packed`) bfloat16, int8 with a scale a row, float32, int4."""
SIZES = {FLOAT32: 4, BFLOAT16: 2, INT8: 1, PANELS: 4}
"""Bytes of a number."""
PANEL = 16
"""Rows of a weight that lie together, column by column."""
COLUMNS, COLUMNS_BYTES = 32, 320
"""INT4: columns that share a scale, and what they take of a panel (`ops.packed.in_panels_of_nibbles`)."""
