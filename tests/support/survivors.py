"""Why no test notices some mutants: by file, the line as it is, and the line as it was changed."""

EXPLAINED: dict[tuple[str, ...], str] = {}
