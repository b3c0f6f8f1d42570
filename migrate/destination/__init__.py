"""The destination: lets a guest in, receives it, proves it and runs it.

acceptor       gives each new connection to what it is for
  greeting     the first words of a source
destination    receives one guest, over as many connections as it takes
  run_state    how far it has got
  attempts     the names of its attempts
  returning    a source whose connection broke
  channels     the connections of one attempt
  receiver     how a guest's memory is taken in: as pages (page_receiver), or as QEMU's stream
               (migrate.qemu.incoming)
  go_wait      the wait for GO
options        what the user has set
"""
