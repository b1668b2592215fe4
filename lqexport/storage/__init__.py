"""Files on disk: the artifact folder, atomic writes, checksums, and the checks of config.json."""
