"""The programs: migrate-src, migrate-dst and migrate-ctl."""
