"""The source: what each migration goes through, and the transfer of pages.

migration           the life of a migration, whatever kind of guest it moves
  attempt           one connection, and how far it got
  reconnection      connects again after a break
  transfer          what a transfer is: of pages (precopy), or of QEMU's stream (migrate.qemu)
  pause             stops the guest for the last round
  hand_over         gives the guest to the destination
precopy             pages: all of them, then round after round
  rounds            the rounds of one attempt, and the last one
  page_sender       the tracker, the encoder and the cache behind them
  batches           makes the batches of a round
  cache_size        the page cache, whose size may change (its contents: proto.codec._cache)
convergence_control applies the decisions of migrate.policy
  throttling        slows the guest
settings, options   what the user has set
telemetry           the statistics, and who is told of them
sample, forecast    --dry-run
"""
