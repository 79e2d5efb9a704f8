"""The geometry of HiP: integers only, shared by both implementations."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EMPTY", "Plan"]

#: Score of a half without keys.
EMPTY = -32000.0


@dataclass(frozen=True)
class Plan:
    """Sizes of a call, and what follows from them.

    Parameters
    ----------
    queries, keys : int
        Tokens; the queries are the last ones.
    top_k : int
        Keys that the search keeps per head and query block.
    block_size_q, block_size_k : int
        Queries and keys of a block.
    group_k : int
        Keys that the search sees as one minimum and maximum.
    window : int
        Last keys of a query block, which its softmax always has.
    unsearched : int
        Last (groups of) keys that the search leaves out.
    sinks : int
        First keys, which every softmax has.
    head_group : int
        Heads that share their budget.
    published_slots : bool
        Slots as in the original for groups of heads, which may overlap.
    all_blocks : bool
        A half is scored by all its blocks.
    """

    queries: int
    keys: int
    top_k: int
    block_size_q: int
    block_size_k: int
    group_k: int
    window: int
    unsearched: int
    sinks: int
    head_group: int
    published_slots: bool
    all_blocks: bool

    @property
    def n_blocks(self) -> int:
        """Blocks of queries."""
        return -(-self.queries // self.block_size_q)

    @property
    def slots(self) -> int:
        """Blocks of keys that the search keeps per head: M."""
        return -(-(self.top_k // self.group_k) // self.block_size_k)

    def rows(self, block: int) -> tuple[int, int]:
        """First and one after the last query of a block."""
        first = block * self.block_size_q
        return first, min(first + self.block_size_q, self.queries)

    def end(self, block: int) -> int:
        """One after the last key that the block's last query may see."""
        return self.rows(block)[1] + self.keys - self.queries

    def length(self, block: int) -> int:
        """Keys (or groups of them) that the search may choose from: T'."""
        return max(-(-self.end(block) // self.group_k) - self.unsearched, 0)

    def key_blocks(self, block: int) -> int:
        """Blocks of keys that the search may choose from: B."""
        return -(-self.length(block) // self.block_size_k)

    def rounds(self, n: int) -> int:
        """How often slots are split, with n blocks of keys."""
        rounds = 0
        while n > self.slots << rounds:
            rounds += 1
        return rounds

    def slot(self, n: int, head: int, slot: int) -> tuple[int, int]:
        """First block and size of a slot at the start, with n blocks of keys."""
        m = self.slots
        first = n * slot // m
        sized = head if self.published_slots else slot
        return first, n * (sized + 1) // m - n * sized // m
