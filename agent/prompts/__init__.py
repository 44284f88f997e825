"""The fixed sentences as data: lines.toml, and who chooses among them. Knows no audio and no call."""
