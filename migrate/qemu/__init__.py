"""Virtual machines: the migration stream of a QEMU, carried from one to another.

source       guest.py, holder.py   a QEMU that migrates to us, and what keeps its socket
             intake.py             its stream, cut into items
             source.py             sends them, in order, until they are taken
             lifting.py            a stream made from a directory
destination  reception.py          takes them in
             place.py              a QEMU that waits for them
             landing.py            a directory, by an incoming QEMU of ours
control      machine.py, client.py, messages.py   a QEMU, driven over its QMP socket
             governor.py           tells it when the rest is quick enough
"""
