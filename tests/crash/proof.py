"""The proof that no power cut breaks a promise: each state that it may leave is opened, compared and worked on."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from rustord.errors import PoolError, RustordError
from rustord.objectstore import ObjectStore
from rustord.page import CHUNK_BYTES
from rustord.testing.device import SECTOR_BYTES
from rustord.testing.recording import Note, State
from tests.crash.disks import Disks
from tests.crash.scenarios import DEVICE_BYTES, Scenario, some
from tests.crash.story import Index, Stage, Story, Told


@dataclass
class Proof:
    """Examines states that power cuts leave, and counts what it examined.

    ``samples`` of each moment with many unflushed writes, a ``share`` of all these, and ``depth`` more power cuts in
    what follows upon each. Of ``losses`` of them, the index is lost as well; of ``absences`` of those with
    several devices, one of these is away for a while.
    """

    seed: int
    samples: int = 4
    share: float = 1.0
    depth: int = 1
    losses: float = 0.3
    absences: float = 0.3
    counts: Counter[str] = field(default_factory=Counter)
    _absences: float = 0.0

    def of(self, scenario: Scenario) -> None:
        """Examine what power cuts leave of a scenario. Raises AssertionError, which says where."""
        chance = random.Random(f"{self.seed} {scenario}")
        stage = Stage(dict.fromkeys(range(scenario.device_count), DEVICE_BYTES), scenario.placer, chance)
        scenario.play(stage)
        has_failed = any(device.failed for device in stage.devices.values())  # which counts as away already
        self._absences = 0.0 if has_failed else self.absences
        self.of_stage(stage, chance)

    def of_stage(self, stage: Stage, chance: random.Random) -> None:
        """Examine what power cuts leave of what was recorded."""
        events = enumerate(stage.recording.events)
        indices = [
            (at, event.value) for at, event in events if isinstance(event, Note) and isinstance(event.value, Index)
        ]
        for state in stage.recording.states(chance, self.samples):
            if chance.random() >= self.share:
                continue
            older = [index for at, index in indices if at < state.point][:-1]
            self.counts["states"] += 1
            try:
                self._examine(stage, state, older, random.Random(chance.random()), self.depth)
            except (AssertionError, RustordError, ValueError) as error:
                where = f"after event {state.point} of {len(stage.recording.events)}, {state.what}"
                raise AssertionError(f"{where}: {error}") from error

    def _examine(self, before: Stage, state: State, older: list[Index], chance: random.Random, depth: int) -> None:
        told = state.notes.get(Told, Told())
        index = state.notes.get(Index, Index({}))
        assert isinstance(told, Told)
        assert isinstance(index, Index)
        stage = before.after(state, index, chance)
        if not told.made:
            stage.create()
            assert stage.check(stage.open()) == {}, "a pool that is made again is not empty"
            return
        stage.check_zeroed()
        stage.check_untraced()
        story = Story(stage, stage.open())
        found = stage.check(story.store)
        if chance.random() < self.losses:
            self._without_index(before, state, chance)
        if len(told.members) > 1 and chance.random() < self._absences:
            self._with_a_device_away(before, state, index, chance)
        if older and chance.random() < 0.2:
            self._with_older_index(before, state, chance.choice([older[0], chance.choice(older)]), chance)
        stage.tell(stage.told.after(found, stage.members(story.store)))
        how = chance.choice(["cut", "lost", "work", "work"])
        if how != "work":
            self.counts["cut again at once"] += 1
            stage.lose_power(lose_index=how == "lost")
            if how == "cut" or self._rebuild(stage):
                assert stage.check(stage.open()) == found, "the second opening found something else"
        elif depth:
            work_on(story, chance)
            for later in sampled(list(stage.recording.states(chance, 1)), 2, chance):
                self.counts["cut again while working"] += 1
                self._examine(stage, later, [], chance, depth - 1)

    def _without_index(self, before: Stage, state: State, chance: random.Random) -> None:
        """The journal alone may be enough, and the devices always are."""
        self.counts["index lost"] += 1
        stage = before.after(state, Index({}), chance)
        store = opened_if_whole(stage)
        if store is not None:
            stage.check(store)
        stage = before.after(state, Index({}), chance)
        if not self._rebuild(stage):
            return
        found = stage.check(stage.open(), redundant=False)
        stage.tell(stage.told._replace(objects=found, putting=(), deleting=frozenset(), unsure={}))
        stage.lose_power()
        store = stage.open()
        assert stage.check(store, redundant=False) == found, "the opening after a rebuild found something else"
        moving = [uuid for uuid in found if uuid in stage.told.moving]
        Story(stage, store).delete(*moving)
        stage.check_untraced()

    def _rebuild(self, stage: Stage) -> bool:
        """Make the index anew; whether that is possible. A torn copy of a mirrored Object stays for a scrub to mend."""
        try:
            report = stage.rebuild()
        except PoolError as error:  # a new, empty device whose label a crash left alone: to be added anew
            if "used without the other devices" not in error.message or len(stage.told.members) == len(stage.sizes):
                raise
            self.counts["rebuild refused"] += 1
            return False
        assert not report.losses, report.losses
        self.counts["rebuilt"] += 1
        return True

    def _with_a_device_away(self, before: Stage, state: State, index: Index, chance: random.Random) -> None:
        """What is written to volumes while a device is away stays when that is back, whatever it brings with it."""
        stage = before.after(state, index, chance)
        told = stage.told
        try:
            store = stage.open(away=chance.choice(sorted(told.members)))
        except PoolError:  # the label of the only other device was being written
            self.counts["no pool without the device away"] += 1
            return
        self.counts["device away"] += 1
        story = Story(stage, store)
        disks = Disks(story)
        if stage.placer.copies == 1:
            story.put(*(some(chance.getrandbits(64), CHUNK_BYTES) for _ in range(3)))  # on blocks that seem to be free
        for name in sorted(store.layers.volumes.keys() & told.disks.keys() - told.unsure.keys()):
            for chunk in range(store.layers.volumes[name].head.size // CHUNK_BYTES):
                data = some(chance.getrandbits(64), SECTOR_BYTES).data
                self.counts["written meanwhile"] += disks.overwrite(name, chunk * CHUNK_BYTES + SECTOR_BYTES, data)
        if chance.random() < 0.5:
            store.close()
        else:
            stage.lose_power()
        rebuilding = chance.random() < self.losses
        try:
            if rebuilding:
                stage.rebuild()
            store = stage.open()
        except PoolError as error:
            if "used without the other devices" not in error.message:
                raise
        else:
            if not any("used without the other devices" in slot.why for slot in store.blocks.slots.values()):
                if told.putting or not told.disks:
                    stage.check_acknowledged(store)
                else:
                    stage.check(store, redundant=False)
                return
        self.counts["refused when it was back"] += 1  # the cut came while labels were being written

    def _with_older_index(self, before: Stage, state: State, index: Index, chance: random.Random) -> None:
        """An older copy is as good, as long as the journal has the rest; or else it is refused."""
        self.counts["older index"] += 1
        stage = before.after(state, index, chance)
        try:
            store = stage.open()
        except PoolError as error:
            if "index" not in error.message:
                raise
            return
        stage.check(store)


def opened_if_whole(stage: Stage) -> ObjectStore | None:
    """The store, if the journal reaches back to the beginning."""
    try:
        return stage.open()
    except PoolError as error:
        if "does not reach" not in error.message:
            raise
        return None


def work_on(story: Story, chance: random.Random) -> None:
    """Some more of everything, on what a power cut left."""
    at = chance.getrandbits(64)
    story.put(some(at, chance.choice([0, 100, 5000, 9000]), chance.choice(["", "a", "new"])), some(at + 1, 6000))
    if chance.random() < 0.5:
        story.move(chance.choice(story.uuids))
    for name in sorted(story.stage.told.disks):
        disks = Disks(story)
        disks.write(name, chance.randrange(16) * 4096, some(at + 3, 6000).data)
        disks.flush(name)
        disks.delete(name)
    if chance.random() < 0.5:
        story.checkpoint()
    moving = [uuid for uuid in story.uuids if uuid in story.stage.told.moving]
    story.delete(chance.choice(moving or story.uuids))
    story.put(some(at + 2, 4000, "a"))


def sampled(states: list[State], count: int, chance: random.Random) -> list[State]:
    return chance.sample(states, min(count, len(states)))
