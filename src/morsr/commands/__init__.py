"""One file per subcommand of `morsr` that is not a Lightning one.

Each `run` raises a MorsrError for what it refuses, before anything is written, and returns 1 where some files failed.
"""
