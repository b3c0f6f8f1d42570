"""Exit codes of migrate-src and migrate-dst. Each error class of migrate.errors has its own.

Exit codes:

    0 completed and verified    1 failed, the guest is at the source as before    2 usage
    3 cannot connect or listen  4 protocol or capability
    5 TLS: a certificate, or a peer that is not allowed                   6 memories differ
    7 did not converge          8 cancelled by the other side
    9 handed over, but not confirmed   10 the guest is here, but --on-complete failed
    129 SIGHUP   130 SIGINT   143 SIGTERM
"""

CODES = __doc__.partition("Exit codes:")[2].strip("\n") if __doc__ else ""
BY_SIGNAL = 128
"""A program that was ended by a signal exits with this and the signal's number, as in a shell."""
