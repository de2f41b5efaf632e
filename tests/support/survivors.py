"""Why no test notices some mutants: by file, the line as it is, and the line as it was changed."""

EXPLAINED: dict[tuple[str, ...], str] = {
    (
        "lightning_hessian/curvature/checks/zero.py",
        "-    same = all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])",
        "+    same = all(torch.equal(gradient, gradients[0]) for gradient in gradients[ 2:])",
    ): "Random outputs are compared in three of four pairs: a piecewise linear target differs at all of them.",
    (
        "lightning_hessian/curvature/methods/duration.py",
        "-HOPELESS = 8",
        "+HOPELESS = 7",
    ): "A choice: columns are not begun where they would take seven times the time left instead of eight.",
    (
        "lightning_hessian/curvature/checks/zero.py",
        "-NUM_DRAWS = 4  # random outputs at which a target is looked at",
        "+NUM_DRAWS = 3  # random outputs at which a target is looked at",
    ): "A choice: three random outputs instead of four, which differ from each other as well.",
    (
        "lightning_hessian/curvature/methods/columns.py",
        "-    at_once = SCRATCH_BYTES // (2 * each[0].numel() * each.element_size())",
        "+    at_once = SCRATCH_BYTES // (2 * each[ -1].numel() * each.element_size())",
    ): "Equivalent: all matrices have the size of the first.",
    (
        "lightning_hessian/curvature/checks/certificate.py",
        "-@dataclass(frozen=True)",
        "+@dataclass(frozen=False)",
    ): "Nothing assigns to its fields; frozen only forbids it.",
}
