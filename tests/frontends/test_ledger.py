"""A ledger is the same for whoever has been given it."""

from __future__ import annotations

import os
from contextlib import closing

from rustord.frontends.ledger import Counts, Ledger


def test_both_see_the_same() -> None:
    with closing(Ledger()) as ours, closing(Ledger(os.dup(ours.fileno()))) as theirs:
        assert (theirs.counts, theirs.leaving, theirs.alone) == (Counts(0, 0, 0, 0), False, False)
        theirs.count(1, 2, 3, 1 << 63)
        ours.leaving = ours.alone = True
        assert (ours.counts, theirs.leaving, theirs.alone) == (Counts(1, 2, 3, 1 << 63), True, True)
        ours.alone = False
        assert (theirs.leaving, theirs.alone) == (True, False)


def test_it_is_there_for_who_does_not_share_it() -> None:
    ledger = Ledger()
    ledger.close()
    ledger.count(5, 0, 0, 0)
    assert ledger.counts.requests == 5
