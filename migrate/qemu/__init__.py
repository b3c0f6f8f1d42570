"""Virtual machines: the migration stream of a QEMU is carried to another QEMU, or to a directory.

source        guest              a QEMU that sends us its stream
              stream_listener    where it connects
              socket_keeper      keeps its socket if this program dies in the hand-over
              orphan             its guest, for `migrate-src resolve`
              outgoing           sends the items of the stream until the destination has them
              switchover         tells QEMU when the last round is short enough
destination   incoming           receives the items
              place              a QEMU that waits for a guest
both          stream             QEMU's stream itself
              snapshot           a machine in a directory
              qmp                QEMU's control socket
"""
