"""The programs: migrate-src, migrate-dst, migrate-ctl and migrate-stream."""
