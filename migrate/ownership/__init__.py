"""Who owns the guest: each side keeps a journal of it, and the source asks after a break.

The claims, and which event leads from one to the next: proto.wire.ownership.

journal            one side's journal of one migration: claims and facts, locked while in use
journal_lines      the format of its lines
journal_directory  which directory journals are kept in, and whether it can be trusted
stored_journals    find and list the journals on disk
source_attempts    what a source's journals say of earlier attempts with the same guest
custody            one guest at the destination, from PREPARED until its owner is decided
records            all guests that a destination knows of; answers the source's questions
ask                the source's questions
"""
