"""Mutants: the store with one of its precautions taken out. Whatever proves the store must tell each of them from it.

A mutant is the source text of a function with a piece of it replaced. Who changes such a function mends the mutant, or
adds one: a text that is not found in the function, or more than once, is an error.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import rustord.blockstore
import rustord.journal
import rustord.membership
import rustord.page
import rustord.placement
import rustord.pool
import rustord.replay
import rustord.stock
from rustord.blockstore import BlockStore
from rustord.journals import Journals
from rustord.keystore.ring import Ring
from rustord.keystore.store import KeyStore
from rustord.notes import Notes
from rustord.objectstore import ObjectStore
from rustord.relocations import Relocations
from rustord.survey import _Journals
from rustord.volume import Volume
from rustord.volumes import Volumes
from tests.crash import scenarios
from tests.crash.scenarios import Scenario


class Edit(NamedTuple):
    function: Callable[..., Any]
    old: str
    new: str = "pass"


class Mutant(NamedTuple):
    """``what`` is left out or done wrongly; ``shown_by`` are the scenarios in which that shows first."""

    what: str
    edits: tuple[Edit, ...]
    shown_by: tuple[Callable[..., None], ...]

    def __str__(self) -> str:
        return self.what

    def scenarios(self) -> list[Scenario]:
        """Those that show the mutant."""
        return [scenario for scenario in scenarios.SCENARIOS if scenario.play in self.shown_by]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The store is the mutant meanwhile."""
        with ExitStack() as stack:
            for edit in self.edits:
                stack.enter_context(_edited(edit))
            yield


@contextmanager
def _edited(edit: Edit) -> Iterator[None]:
    function = inspect.unwrap(edit.function)
    assert isinstance(function, FunctionType)
    source = textwrap.dedent(inspect.getsource(function))
    times = source.count(edit.old)
    if times != 1:
        raise LookupError(f"{edit.old!r} is {times} times in {function.__qualname__}; mend the mutant")
    original = function.__code__
    function.__code__ = _compiled(source.replace(edit.old, edit.new), function)
    try:
        yield
    finally:
        function.__code__ = original


def _compiled(source: str, function: FunctionType) -> CodeType:
    tree = ast.parse(source)
    tree.body.insert(0, ast.parse("from __future__ import annotations").body[0])
    scope: dict[str, Any] = {}
    exec(compile(tree, f"<mutant of {function.__qualname__}>", "exec"), function.__globals__, scope)
    mutant = inspect.unwrap(scope[function.__name__])
    assert isinstance(mutant, FunctionType)
    return mutant.__code__


pool = rustord.pool
replay = rustord.replay
stock = rustord.stock
membership = rustord.membership
page = rustord.page
blockstore = rustord.blockstore
journal = rustord.journal
cycle = ObjectStore.cycle


def _mutants() -> Iterator[Mutant]:
    def mutant(what: str, *edits: tuple[Any, ...], by: tuple[Callable[..., None], ...]) -> Mutant:
        return Mutant(what, tuple(Edit(*edit) for edit in edits), by)

    s = scenarios
    freed = (s.using_freed_blocks_after_a_crash, s.using_freed_blocks_at_once)
    # Flushes
    yield mutant(
        "the flush of a cycle is left out",
        (cycle, "failed |= self.blocks.flush((committed | erased) - failed.keys())"),
        by=(s.putting,),
    )
    yield mutant(
        "the erasure is not flushed",
        (cycle, "committed | erased", "committed"),
        by=(s.replacing_and_deleting,),
    )
    yield mutant("a flush does nothing", (BlockStore._flush, ".flush()", ""), by=(s.putting,))
    yield mutant(
        "the copies of the label are written all at once",
        (rustord.blockstore.write_label, "        device.flush()", "    device.flush()"),
        by=(s.closing_and_opening, s.making_a_pool),
    )
    yield mutant(
        "what an opening erases is not flushed",
        (pool._finish_erasures, "blocks.flush(touched)", "{}"),
        by=(s.crashing_often, s.closing_and_opening),
    )
    # PUT
    yield mutant(
        "the last batch is not verified",
        (replay._is_copy_whole, "return False", "return True"),
        by=(s.putting,),
    )
    yield mutant(
        "data is not compared with its checksums",
        (
            replay._steps,
            "partial(blocks.verify, record, number, offset, min(step, record.size - offset))",
            "lambda: True",
        ),
        by=(s.putting,),
    )
    yield mutant(
        "the footer is not verified",
        (replay._footer_is_whole, "== footer", "is not None"),
        by=(s.putting,),
    )
    yield mutant(
        "a copy that was torn is not made anew",
        (replay._is_whole, "if is_whole is False:", "if False:"),
        by=(s.putting,),
    )
    yield mutant(
        "the footer is not written",
        (
            rustord.placement.writes,
            "zip(placed.copies, placed.tails, strict=True)",
            "zip(placed.copies, [bytes(len(tail)) for tail in placed.tails])",
        ),
        by=(s.putting,),
    )
    yield mutant(
        "the index knows of a PUT before the journal is durable",
        (
            cycle,
            "committed, refused = self._journal(batch, failed)",
            "committed, refused = self._journal(batch, failed)\n"
            "    puts = [(put.record, put.replaced_uuid) for put in batch.puts if not put.failure(failed)]\n"
            "    self.keystore.learn(puts, (), (), (), self.journals.sequence); self.keystore.checkpoint()",
        ),
        by=(s.putting,),
    )
    yield mutant(
        "durable is the sequence of the batch itself",
        (Journals.append, "self._durable", "self.sequence"),
        by=(s.putting,),
    )
    yield mutant(
        "the journal does not say what is replaced",
        (ObjectStore._journal, "placed.replaced_uuid", "bytes(16)"),
        by=(s.replacing_and_deleting,),
    )
    yield mutant(
        "the journal's signatures are not compared",
        (journal.decode_batch, "if sign(secret, view[_SIGNED_FROM:length]) != signature:", "if False:"),
        by=(s.deleting_many,),
    )
    yield mutant(
        "an Object is verified though its blocks are another's by now",
        (replay.take_journals, "if record.uuid in gone:", "if False:"),
        by=freed,
    )
    # Moving
    yield mutant(
        "a move that was torn is believed",
        (replay._is_believed, "return not any(has_footer(old, blocks, label) for old in earlier)", "return True"),
        by=(s.moving,),
    )
    yield mutant(
        "a DELETE is answered while the blocks are not erased that the Object was moved from",
        (ObjectStore._settle_deletes, "self.erasures.take_left_behind(record.uuid)", "[]"),
        by=(s.moving,),
    )
    yield mutant(
        "a DELETE is answered while a copy is there that is to become the Object's",
        (ObjectStore._settle_deletes, "self.relocations.take_back(record.uuid)", "[]"),
        by=(s.moving_slowly,),
    )
    yield mutant(
        "the journal does not say which blocks are being filled with a copy",
        (
            Journals.announce,
            "_, failed = self._note(entries, devices, ())",
            "failed = {}",
        ),
        by=(s.moving,),
    )
    yield mutant(
        "that blocks are being filled with a copy is not flushed before they are",
        (Journals._note, "self._blocks.flush(written)", "(self._blocks.flush(written) if copied else {})"),
        by=(s.moving,),
    )
    yield mutant(
        "the index forgets a copy before it is the Object's own",
        (
            Relocations.copy,
            "relocation.copy(pace)",
            "relocation.copy(pace); self._keystore.learn((), (), (), [relocation.id], self._journals.sequence)",
        ),
        by=(s.moving_slowly,),
    )
    yield mutant(
        "the journal says that a copy is over when it is made",
        (
            Relocations.copy,
            "relocation.copy(pace)",
            "relocation.copy(pace); self._journals.remember_erased(relocation.new, [relocation.id])",
        ),
        by=(s.moving_slowly,),
    )
    yield mutant(
        "a copy is forgotten at the start",
        (KeyStore.replay, "if entry.kind is Kind.GRAVE:", "if False:"),
        by=(s.moving,),
    )
    yield mutant(
        "a copy is forgotten by a rebuild",
        (_Journals.graves_left, "if id not in self.erased", "if False"),
        by=(s.moving,),
    )
    yield mutant(
        "the batch that tells of a copy is overwritten",
        (KeyStore._carry, "carried += map(encode_entry, self._noted.values())"),
        by=(s.copying_while_the_journal_goes_around,),
    )
    yield mutant(
        "a copy that is given up is not erased",
        (Relocations._give_up, "if relocation.id is None:", "if True:"),
        by=(s.moving_slowly,),
    )
    # DELETE
    yield mutant(
        "the blocks are erased before the tombstone is durable",
        (ObjectStore._stage_delete, "batch.gone.add(delete.uuid)", "self.blocks.erase(record.extents)"),
        by=(s.replacing_and_deleting,),
    )
    yield mutant(
        "the blocks are free before they are erased",
        (
            ObjectStore._settle_deletes,
            "self.stock.remove(record)",
            "self.stock.remove(record); self.allocator.release(record.extents)",
        ),
        (ObjectStore._bury, "self.allocator.release(erase.extents)"),
        by=(s.deleting_and_putting_at_once,),
    )
    yield mutant(
        "the blocks are not erased",
        (BlockStore.erase, "self.writable(index).zero(block * block_size, count * block_size)"),
        by=(s.replacing_and_deleting,),
    )
    yield mutant(
        "ERASED is in the journal before the erasure is durable",
        (
            ObjectStore._erase,
            "    for erase in waiting:\n            erase.erased = True",
            "    for erase in waiting:\n            erase.erased = True\n"
            "            self.journals._erased.setdefault(0, []).extend(erase.ids)",
        ),
        by=(s.deleting_and_putting_at_once,),
    )
    yield mutant(
        "a tombstone is not in the journal",
        (KeyStore.journal, "delete_entry(sequence, record.uuid)", "delete_entry(sequence, bytes(16))"),
        by=(s.replacing_and_deleting,),
    )
    yield mutant(
        "graves are forgotten at the start",
        (pool._finish_erasures, "for grave in graves:", "for grave in ():"),
        by=(s.replacing_and_deleting,),
    )
    yield mutant(
        "a grave is erased though its blocks are another's by now",
        (rustord.stock._add_graves, "_not_in(used[extent.device], extent)", "(extent,)"),
        by=freed,
    )
    # The journal and the index
    yield mutant(
        "batches are overwritten that the index does not have",
        (Ring._room, 'raise RingFull(f"the journal has no room for {block_count} blocks")', "return 0"),
        by=(s.filling_the_journal,),
    )
    yield mutant(
        "batches are let go before the index has them",
        (KeyStore._append, "self.checkpoint()", "ring.release(1 << 62, 1 << 62)"),
        by=(s.filling_the_journal,),
    )
    yield mutant(
        "an old copy of the index is believed",
        (KeyStore.add_ring, "if ring.is_broken():", "if False:"),
        by=(s.going_around_the_journal,),
    )
    yield mutant(
        "the labels' generation is not in the index",
        (
            pool._replay,
            "expect_generation(replay.label.generation)",
            "expect_generation(replay.label.generation - 1)",
        ),
        by=(s.closing_and_opening,),
    )
    yield mutant(
        "the new device's label is written before the index knows of it",
        (
            membership.add_device,
            "store.keystore.note_generation(generation + 1)\n"
            "    write_label(device, replace(label, generation=generation).for_member(member))",
            "write_label(device, replace(label, generation=generation).for_member(member))\n"
            "    store.keystore.note_generation(generation + 1)",
        ),
        by=(s.adding_a_device,),
    )
    yield mutant(
        "the other labels name a new device before it has one",
        (
            membership.add_device,
            "write_label(device, replace(label, generation=generation).for_member(member))",
            "renew_labels(store, label)",
        ),
        by=(s.adding_a_device,),
    )
    yield mutant(
        "the new device's label is of another round than the others",
        (membership.add_device, "replace(label, generation=generation + 1)", "replace(label, generation=generation)"),
        by=(s.adding_a_device,),
    )
    yield mutant(
        "a device is wiped while the others name it",
        (
            membership.remove_device,
            "renew_labels(store, replace(store.label, members=members))",
            "wipe(device, slot.geometry); device.flush()\n"
            "    renew_labels(store, replace(store.label, members=members))",
        ),
        by=(s.removing_a_device,),
    )
    # Bad blocks
    yield mutant(
        "the table of bad blocks is not flushed",
        (blockstore.write_bad_blocks, "device.flush()"),
        by=(s.condemning,),
    )
    yield mutant(
        "the copies of the table of bad blocks are written all at once",
        (blockstore.write_bad_blocks, "        device.flush()", "    device.flush()"),
        by=(s.condemning,),
    )
    yield mutant(
        "bad blocks are free at the start",
        (stock.take_stock, "allocator.condemn(Extent(index, run.block, run.count) for run in slot.bad.runs)"),
        by=(s.condemning,),
    )
    yield mutant(
        "a batch after a crash proves what was before the crash",
        (
            replay.was_flushed,
            "return between < 0 or label.voids[between][1] <= sequence",
            "return True",
        ),
        by=(s.crashing_often,),
    )
    # Volumes
    yield mutant(
        "a flush of a volume leaves the map where it was",
        (Volume._commit_oldest, "if chunks or pages:", "if False:"),
        by=(s.writing_a_volume,),
    )
    yield mutant(
        "what was written to a volume in place is not flushed",
        (Volume._commit_oldest, "self._flush_devices(dirty)"),
        by=(s.writing_a_volume,),
    )
    yield mutant(
        "a change of a map is not flushed",
        (Journals._note, "failed |= self._blocks.flush(written)"),
        by=(s.writing_a_volume,),
    )
    yield mutant(
        "the blocks of a volume that is deleted are not erased",
        (ObjectStore._sweep, "[Erase(extents, layers=layers)]", "[]"),
        by=(s.writing_a_volume,),
    )
    yield mutant(
        "the map of a volume is not kept",
        (KeyStore.checkpoint, "self._keep_pages(wanted)", "True"),
        by=(s.keeping_a_map,),
    )
    yield mutant(
        "the map of a volume is kept in one place",
        (page.slot_of, "page.generation % SLOT_COUNT", "0"),
        by=(s.keeping_a_map,),
    )
    yield mutant(
        "what an opening learnt of maps is not marked as to be kept",
        (KeyStore.checkpoint, 'puts[UNKEPT] = b""'),
        by=(s.keeping_a_map,),
    )
    yield mutant(
        "maps that are marked are not kept",
        (KeyStore.keep_all, "if self._backend.get(UNKEPT) is None:", "if True:"),
        by=(s.keeping_a_map,),
    )
    yield mutant(
        "a volume is frozen without a flush",
        (Volumes.freeze, "volume.flush()"),
        by=(s.freezing_and_cloning,),
    )
    yield mutant(
        "a volume that was frozen when the power failed stays a volume",
        (pool._finish_freezing, "if store.layers.is_frozen(layer):", "if False:"),
        by=(s.freezing_and_cloning,),
    )
    yield mutant(
        "an Object is erased though a clone builds on it",
        (ObjectStore._settle_deletes, "if record.uuid in self.layers.users:", "if False:"),
        by=(s.cloning_an_object,),
    )
    yield mutant(
        "the index forgets an Object that a clone builds on",
        (KeyStore._learn_delete, "if uuid in self._bases.values():", "if False:"),
        by=(s.cloning_an_object,),
    )
    yield mutant(
        "the journal does not say which blocks are being filled with chunks of a volume",
        (
            Volume.move,
            "self._announce(layer, [(extent,) for extent in places.values()])",
            "[RecordId(layer.uuid, 1)] * len(places)",
        ),
        by=(s.moving_a_volume,),
    )
    yield mutant(
        "the journal does not say which blocks are being filled with what a clone has of its base",
        (Volume._write_first, "self._take_announced() if is_copy", "self._take_announced() if False"),
        by=(s.deleting_a_clone_after_a_crash,),
    )
    yield mutant(
        "what the chunks of a volume have left is no grave",
        (Journals.note, "if left else []", "if False else []"),
        by=(s.moving_a_volume,),
    )
    # Devices that are away for a while
    between = (s.moving_a_volume_between_devices, s.writing_a_volume)
    yield mutant(
        "a MAP counts that its home does not have",
        (Notes.uncounted, "if at is not None and at not in devices and reaches(at, sequence):", "if False:"),
        by=between,
    )
    yield mutant(
        "what a MAP speaks of is free as long as its home is missing",
        (Notes.graves, "if isinstance(change, MapEntry) and", "if False and"),
        by=between,
    )
    yield mutant(
        "blocks are erased that only a home which is missing can tell of",
        (pool._certain, 'return home is not None and home.state != "online"', "return False"),
        by=between,
    )
    yield mutant(
        "a LAYER is in the journal of its home alone",
        (Journals.note, "devices.update(writable)", "devices.add(note.home)"),
        by=between,
    )
    yield mutant(
        "an old LAYER counts, or one that comes too late",
        (Notes.uncounted, "if needed - devices if is_late else sequence <= indexed_sequence:", "if False:"),
        by=between,
    )
    yield mutant(
        "a PUT is believed though a copy of it that can be asked is not whole",
        (replay._is_whole, "return False if False in whole else None", "return None"),
        by=(s.replacing_and_deleting, s.adding_a_device),
    )
    # Devices that fail
    yield mutant(
        "a PUT is acknowledged though a flush failed",
        (ObjectStore._settle_puts, "if error := placed.failure(failed):", "if False:"),
        by=(s.failing_flush_of_one,),
    )
    yield mutant(
        "UNDO is ignored",
        (replay.take_journals, "if entry.kind is Kind.UNDO for", "if False for"),
        by=(s.failing_flush,),
    )
    yield mutant(
        "no UNDO is written",
        (ObjectStore._settle_puts, "batch.following.append(Undo(record, placed.remains(record, replaced), ids))"),
        by=(s.failing_flush,),
    )
    yield mutant(
        "of two Objects that took one name on different devices, both stay",
        (KeyStore._replay_put, "self._learn_delete(overlay, other, record.sequence)"),
        by=(s.failing_to_take_back,),
    )
    yield mutant(
        "a change of a Layer that failed in the flush is left to the journals",
        (Journals.note, "if failed and not written and not any(", "if failed or any("),
        by=(s.failing_to_make_a_volume,),
    )
    yield mutant(
        "pages that a device did not take are not written again",
        (BlockStore.keep_pages, "return not failed", "return True"),
        by=(s.failing_to_make_a_volume,),
    )
    yield mutant(
        "blocks are free though the flush of their erasure failed",
        (
            ObjectStore._bury,
            "erase.error or next((failed[e.device] for e in erase.extents if e.device in failed), None)",
            "None",
        ),
        by=(s.failing_erasure,),
    )


MUTANTS: list[Mutant] = list(_mutants())
