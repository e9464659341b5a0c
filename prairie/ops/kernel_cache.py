"""numba keeps what it compiled on disk, and knows that it is stale by the date of the one file where the kernel stands.

A kernel that calls into other files therefore closes over their `revision`: what a function closes over is part of the
key under which it is kept.

What a kernel calls is compiled twice: by itself, and as a copy inside the kernel. The process that compiles has both
under one name and may run the first, later processes have the second. Where sums may be regrouped (fastmath) the two
differ in their last bits, so such functions have `forceinline`: then nothing is called by that name.
"""

from pathlib import Path
from zlib import crc32


def revision(*files: str) -> int:
    """A number of what stands in some files of this room, named without `.py`."""
    found = 0
    for name in files:
        found = crc32((Path(__file__).parent / f"{name}.py").read_bytes(), found)
    return found
