"""Tests that every :class:`IndexStore` passes. Subclass :class:`IndexStoreContract` in a test module of your own, and
run it with pytest, which this file does not import: `Another database` in docs/operator/indexes.md has an example."""

from __future__ import annotations

import numpy as np

from serving.indexes.store import Counts, IndexStore, Skip, Vector

VECTORS = np.eye(8, dtype=np.float32)


class IndexStoreContract:
    """IDs are "1", "2" and "3", images URIs that no test fetches, vectors of 8 dimensions."""

    def store(self) -> IndexStore:
        """Connect to the same rows as before; each test begins without any."""
        raise NotImplementedError

    def put(self, id: str, image: str) -> None:
        """Add a row, or change its image, as a user does."""
        raise NotImplementedError

    def delete(self, id: str) -> None:
        raise NotImplementedError

    def read(self) -> tuple[str, dict[str, Vector]]:
        """What a client finds by the index's name: the space, and vectors by ID."""
        raise NotImplementedError

    def _fill(self, store: IndexStore, space: str, shift: int = 0) -> None:
        while rows := store.pending(space, 2):
            store.write(space, [(row, VECTORS[(int(row.id) + shift) % 8]) for row in rows])

    def _filled(self) -> IndexStore:
        for id in "123":
            self.put(id, f"file:///{id}")
        store = self.store()
        for shift, space in enumerate(("aa", "bb")):
            store.open(space, 8)
            self._fill(store, space, shift)
        return store

    def test_pending_rows_come_by_id_and_are_written_once(self) -> None:
        for id in "312":
            self.put(id, f"file:///{id}")
        store = self.store()
        store.open("aa", 8)
        store.open("aa", 8)
        first = store.pending("aa", 2)
        assert [(row.id, row.image) for row in first] == [("1", "file:///1"), ("2", "file:///2")]
        assert [row.id for row in store.pending("aa", 2, after="2")] == ["3"]
        assert store.write("aa", [(first[1], VECTORS[2])]) == 1
        assert [row.id for row in self.store().pending("aa", 9)] == ["1", "3"]
        assert store.counts("aa") == Counts(rows=1, total=3, skipped=0, transient=0)

    def test_a_row_that_changed_is_pending_again_and_not_overwritten(self) -> None:
        store = self._filled()
        self.put("2", "file:///new")
        (row,) = store.pending("aa", 9)
        assert [each.id for each in store.pending("bb", 9)] == ["2"]
        self.put("2", "file:///newer")
        assert store.write("aa", [(row, VECTORS[0])]) == 0
        assert [each.image for each in store.pending("aa", 9)] == ["file:///newer"]

    def test_a_skipped_row_does_not_block_until_its_image_changes(self) -> None:
        store = self._filled()
        self.put("1", "file:///bad")
        self.put("2", "file:///away")
        rows = store.pending("aa", 9)
        store.write("aa", [(rows[0], Skip("no image")), (rows[1], Skip("timeout", transient=True))])
        assert not store.pending("aa", 9)
        counts = store.counts("aa")
        assert (counts.skipped, counts.transient) == (2, 1)
        self.put("1", "file:///good")
        self._fill(store, "aa")
        assert store.counts("aa").skipped == 1

    def test_clients_see_one_space_and_go_back_to_the_other(self) -> None:
        store = self._filled()
        for space, shift in (("aa", 0), ("bb", 1), ("aa", 0)):
            store.build(space)
            store.point(space)
            store.point(space)
            seen, vectors = self.read()
            assert seen == space
            assert {id: int(vector.argmax()) for id, vector in vectors.items()} == {
                id: int(id) + shift for id in ("1", "2", "3")
            }

    def test_deleted_rows_are_not_found(self) -> None:
        store = self._filled()
        store.point("aa")
        self.delete("2")
        assert store.counts("aa").rows == 2
        assert set(self.read()[1]) == {"1", "3"}

    def test_searches_are_exact_and_approximate(self) -> None:
        store = self._filled()
        store.build("aa")
        for exact in (True, False):
            assert np.allclose(store.search("aa", VECTORS[2], 2, exact), [1, 0], atol=1e-5)
        assert {int(vector.argmax()) for vector in store.sample("aa", 9)} == {1, 2, 3}

    def test_dropped_spaces_leave_nothing(self) -> None:
        store = self._filled()
        store.point("bb")
        store.drop("aa")
        assert self.read()[0] == "bb"
        store.drop("bb")
        store.drop("bb")
        self.put("1", "file:///x")
        store.open("aa", 8)
        assert [row.id for row in store.pending("aa", 9)] == ["1", "2", "3"]
