"""What the commands print for people, from the same records that `--json` prints."""
