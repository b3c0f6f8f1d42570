"""Connections: addresses, connecting, listening, TLS, and the link that carries frames.

link             one connection to the peer, speaking frames
  receive_queue  frames that wait to be received, within bounds
  liveness       when the peer is lost, and when to send a PING (pings: those under way)
  rate_limit     --max-bandwidth
channels         the connections of one attempt, at the source
connect          connects to a destination
  address        tcp:HOST:PORT, unix:PATH
  name_lookup    the addresses of a host name
  happy_eyeballs whichever of them answers first
listen           listens for sources (listening_sockets: on all addresses of a host)
  admission      bounds strangers, so that they cannot push out a source
  networks       who may connect (--allow), and whether a connection leaves this host
tls              credentials, and whom they admit (certificate_names)
  tls_session    one session without a socket: the handshake, records in and out
  tls_transport  runs it over a connection, and bounds its time
keepalive        has the kernel notice a lost peer too
probe            measures round trip and bandwidth for a dry run
retry_budget     how long to try again without progress
"""
