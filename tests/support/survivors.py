"""Why no test notices some mutants: by file, the line as it is, and the line as it was changed."""

# Nothing that the code computes or says can differ.
EQUIVALENT: dict[tuple[str, ...], str] = {
    (
        "lightning_hessian/curvature/methods/columns.py",
        "-    at_once = SCRATCH_BYTES // (2 * each[0].numel() * each.element_size())",
        "+    at_once = SCRATCH_BYTES // (2 * each[ -1].numel() * each.element_size())",
    ): "All matrices have the size of the first.",
    (
        "lightning_hessian/curvature/methods/columns.py",
        "-    transposed, difference = groups[0].new_empty(groups[0].shape), groups[0].new_empty(groups[0].shape)",
        "+    transposed, difference = groups[ -1].new_empty(groups[0].shape), groups[0].new_empty(groups[0].shape)",
    ): "``new_empty`` takes type and device alone from what it is called on.",
    (
        "lightning_hessian/curvature/checks/certificate.py",
        "-@dataclass(frozen=True)",
        "+@dataclass(frozen=False)",
    ): "Nothing assigns to its fields; frozen only forbids it.",
    (
        "lightning_hessian/curvature/checks/diagnosis.py",
        '-        return f"sample {numbers[0]}"',
        '+        return f"sample {numbers[ -1]}"',
    ): "There is a single number there.",
    (
        "lightning_hessian/curvature/checks/certificate.py",
        "-    at = Differences(*(getattr(every, f.name).gather(0, sharpest)[0] for f in fields(every)))",
        "+    at = Differences(*(getattr(every, f.name).gather(0, sharpest)[ -1] for f in fields(every)))",
    ): "``sharpest`` has a single row.",
    (
        "lightning_hessian/curvature/functions.py",
        "-        return WholeHessians(zero, zero[..., 0, 0], Counter())",
        "+        return WholeHessians(zero, zero[..., 0, 1], Counter())",
    ): "All entries are zero, and there are many: few inputs take another path.",
    (
        "lightning_hessian/curvature/methods/columns.py",
        '-    return num_columns.most_common(1)[0][0] if num_columns else "reverse_over_reverse"',
        '+    return num_columns.most_common( 2)[0][0] if num_columns else "reverse_over_reverse"',
    ): "The first of two is the first of one.",
    (
        "lightning_hessian/curvature/methods/lanczos.py",
        "-    scale = norm.where(norm > 0, 1)",
        "+    scale = norm.where(norm > 0, 2)",
    ): "Vectors of norm zero, and their products, are zeros whatever they are divided by.",
    (
        "lightning_hessian/curvature/checks/coupling.py",
        "-        cases = (beside_others, (single, 0), (single.repeat_interleave(len(OFFSETS)), 0))",
        "+        cases = (beside_others, (single, 0), (single.repeat_interleave(len(OFFSETS)), -1))",
    ): "The last of five copies of a sample instead of the first.",
}

# Constants that might as well have the other value.
CHOICES: dict[tuple[str, ...], str] = {
    (
        "lightning_hessian/curvature/checks/zero.py",
        "-    same = all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])",
        "+    same = all(torch.equal(gradient, gradients[0]) for gradient in gradients[ 2:])",
    ): "Random outputs are compared in two of three pairs: a piecewise linear target differs at all of them.",
    (
        "lightning_hessian/curvature/methods/duration.py",
        "-HOPELESS = 8",
        "+HOPELESS = 7",
    ): "Columns are not begun where they would take seven times the time left instead of eight.",
    (
        "lightning_hessian/curvature/methods/duration.py",
        "-HOPELESS = 8",
        "+HOPELESS = 9",
    ): "Columns are not begun where they would take nine times the time left instead of eight.",
    (
        "lightning_hessian/curvature/checks/zero.py",
        "-NUM_DRAWS = 4  # random outputs at which a target is looked at",
        "+NUM_DRAWS = 3  # random outputs at which a target is looked at",
    ): "Three random outputs instead of four, which differ from each other as well.",
    (
        "lightning_hessian/curvature/checks/zero.py",
        "-ROUNDING = 1000.0  # multiples of eps·max |t| per squared rms of the input",
        "+ROUNDING = 1001.0  # multiples of eps·max |t| per squared rms of the input",
    ): "What is called rounding may be 0.1 % larger.",
    (
        "lightning_hessian/curvature/checks/verdict.py",
        "-        chosen = {(self.turn * count + i) % num_samples for i in range(count)}",
        "+        chosen = {(self.turn * count - i) % num_samples for i in range(count)}",
    ): "Samples take turns in another order.",
}

# Code that is there no more.
REMOVED: dict[tuple[str, ...], str] = {
    (
        "lightning_hessian/curvature/operators/autodiff.py",
        "-        vectors = v.transpose(0, 1).reshape(self.batch.num_classes, *self._x.shape)",
        "+        vectors = v.transpose(0, 0).reshape(self.batch.num_classes, *self._x.shape)",
    ): "Nothing used this function, and it was removed.",
}
KINDS = {"equivalent": EQUIVALENT, "choice": CHOICES, "removed": REMOVED}


def explanation_of(path: str, change: list[str]) -> tuple[str, str]:
    """The kind of a survivor, and why it is one."""
    key = (path, *change)
    found = ((kind, known[key]) for kind, known in KINDS.items() if key in known)
    return next(found, ("unexplained", ""))
