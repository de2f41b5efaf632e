"""Why a case did not come out right: pattern of the case, verdicts, explanation; the first that fits counts."""

EXPLANATIONS: tuple[tuple[str, str, str], ...] = ()
