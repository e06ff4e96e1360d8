"""One file per subcommand of `morsr` that is not a Lightning one."""
