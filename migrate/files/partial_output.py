"""A part of an output under a hidden name, which an earlier program has not finished."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

from migrate.files.directory import SUFFIX, Directory
from migrate.files.identity import Identity, parse_identity


@dataclass(frozen=True)
class PartialOutput:
    """What the journal of an earlier program says of its unfinished output.

    path      -- of the output
    directory -- that the output and its hidden file or directory are in
    name      -- the hidden one
    identity  -- of what had that name
    tree      -- whether that was a directory; a file's inode may be a directory of others by now
    """

    path: str
    directory: str
    name: str
    identity: Identity
    tree: bool = False

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> PartialOutput:
        """Read the facts about a place in a journal.

        Raises ValueError if they are not as we write them: a journal must not lead us to other
        files.
        """
        path, hidden, identity = facts.get("path"), facts.get("temporary"), facts.get("inode")
        if not isinstance(path, str) or not isinstance(hidden, str) or not os.path.isabs(path):
            raise ValueError("no paths")
        directory, name = os.path.split(hidden)
        beside = directory == os.path.dirname(path) and path == os.path.normpath(path)
        if not (beside and name.startswith(".") and name.endswith(SUFFIX)):
            raise ValueError("no hidden name beside the output")
        tree = facts.get("kind") == "snapshot"
        return cls(path, directory, name, parse_identity(identity), tree=tree)

    @property
    def exists(self) -> bool:
        """Whether it is still there."""
        with contextlib.suppress(OSError), Directory(self.directory) as directory:
            return directory.entry_is(self.name, self.identity)
        return False

    def remove(self) -> None:
        """Remove it, if it is there and can be removed."""
        with contextlib.suppress(OSError), Directory(self.directory) as directory:
            remove = directory.remove_tree if self.tree else directory.remove_file
            remove(self.name, self.identity)
