"""Where the threads of a step meet. A step is a row of phases, each of them pieces that any thread may take (a ticket).
A phase is over when its pieces are done, not when all threads have come: one that the machine has set aside holds
nobody up unless it holds a piece. Between steps helpers wait at a semaphore.
Not here: what a piece is (`ops.decoder`).
"""

from __future__ import annotations

from numba import njit

from prairie.ops.addresses import add_to_word, call_c, exchanged, load_word, pause, store_word
from prairie.ops.decoder_plan import DONE, STATE, TICKET_BITS

PIECE_BYTES = 1 << 17
"""Of a weight, at most, in a piece: it stays in the second cache while blocks of tokens pass by."""
PIECES_EACH = 6
"""At least so many pieces of a phase for each thread."""

SPINS = 2000
"""How often a thread looks again before it offers its core to others."""


@njit(nogil=True, error_model="numpy")
def take_piece(p, phase, pieces):
    """A piece of this phase for the caller, -1 when the phase is over. Waits for those who still work on their pieces.

    Nothing of the plan but its constants may be used without a ticket in hand: a thread that comes late would read
    what is being written for the next step. A ticket is only given while its step lasts.
    """
    gate, looks = p.gate, 0
    while True:
        state: int = load_word(gate + STATE)
        now, piece = state >> TICKET_BITS, state & ((1 << TICKET_BITS) - 1)
        if now > phase:
            return -1
        if now == phase and piece < pieces:
            if exchanged(gate + STATE, state, state + 1):
                return piece
        else:
            looks += 1
            if looks < SPINS:
                pause()
            else:
                call_c(p.give_way, 0)


@njit(nogil=True, error_model="numpy")
def piece_done(p, phase, pieces):
    """A piece is done; with the last one the next phase begins."""
    if add_to_word(p.gate + DONE, 1) == pieces - 1:
        store_word(p.gate + DONE, 0)
        store_word(p.gate + STATE, (phase + 1) << TICKET_BITS)


@njit(nogil=True, error_model="numpy")
def pieces_of(threads, units, bytes_each):
    """How many units a piece has, and how many pieces there are."""
    each = max(1, PIECE_BYTES // bytes_each)
    if threads > 1:
        each = min(each, max(1, units // (PIECES_EACH * threads)))
    return each, (units + each - 1) // each


@njit(nogil=True, error_model="numpy")
def wait_for_step(p, door):
    """Waits until a step wants help: for a moment awake, then asleep."""
    for _ in range(SPINS):
        if call_c(p.try_wait, door) == 0:
            return
        pause()
    while call_c(p.wait, door) != 0:
        pass
