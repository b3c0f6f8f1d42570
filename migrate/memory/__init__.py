"""Guest memory: how it is read, which pages were written, and its digest."""
