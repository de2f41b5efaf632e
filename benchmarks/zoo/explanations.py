"""Why a case did not come out right: pattern of the case, verdicts, explanation; the first that fits counts."""

NO_SECOND = "PyTorch has no (second) derivative of this operation; the error names it."
NOT_FINITE = "The sample input itself holds infinite or undefined numbers, or the values are."
NOT_OF_VALUES = (
    "What autograd gives is deliberately not the derivative of the values: gradients are dropped, scaled or "
    "straight through."
)

EXPLANATIONS: tuple[tuple[str, str, str], ...] = (
    ("*multi_margin_loss*", "refused", NO_SECOND),
    ("*multilabel_margin_loss*", "refused", NO_SECOND),
    ("*MultiMarginLoss*", "refused", NO_SECOND),
    ("*MultiLabelMarginLoss*", "refused", NO_SECOND),
    ("*CTCLoss*", "refused", NO_SECOND),
    ("*ctc_loss*", "refused", NO_SECOND),
    ("*cdist*", "refused", NO_SECOND),
    ("*pdist*", "refused", NO_SECOND),
    ("module_db.LPPool*", "refused", "A root of a negative sum: the values are not finite at this sample input."),
    ("module_db.KLDivLoss*", "refused", "The sample input, a logarithm of random numbers, is not finite."),
    ("op_db.igamma*", "crashed refused", "PyTorch has no derivative with respect to the first argument."),
    ("op_db.resize_*", "crashed refused", "PyTorch resizes no tensor that gradients are taken of."),
    ("op_db.as_strided_scatter*", "caught", "Autograd's gradient is wrong where nothing is scattered: 0.66, not 0."),
    (
        "op_db.nn.functional.max_unpool*",
        "caught",
        "Indices repeat: one of several values is written, all get gradients.",
    ),
    ("op_db.nn.functional.embedding*", "caught", NOT_OF_VALUES),
    ("op_db.native_layer_norm*", "caught", "Mean and deviation, which it also returns, get no gradients."),
    ("op_db.*native_batch_norm*", "caught", "Mean and deviation, which it also returns, get no gradients."),
    ("op_db.normal*", "caught", "The random number scales with the input; autograd says zero."),
    (
        "op_db.nn.functional.scaled_dot_product_attention/0",
        "alarmed",
        "Saturated: gradient and Hessian are 1e-11 of the values, below what differences of values can confirm, and "
        "rounding has left the Hessian asymmetric by 1e-5.",
    ),
    (
        "op_db.logcumsumexp/0",
        "alarmed",
        "Zero up to 1e-16 at inputs of 10,000.",
    ),
    ("op_db.nn.functional.group_norm/20", "alarmed caught", "Lost in the rounding of float32, as the message says."),
    ("op_db.round*", "undecidable", "Stairs."),
    ("op_db.__rmod__*", "undecidable", "A jump next to the sample."),
    ("op_db.special.*bessel_j1/2", "wrong", "Found: with D = 1 the certificate's direction could cancel to zero."),
    ("op_db.special.*", "caught", "PyTorch has no derivative and raises nothing: autograd says zero."),
    ("op_db.special.*", "refused", NOT_FINITE),
    (
        "op_db.linalg.eig/*",
        "crashed",
        "Depends on the phase of complex eigenvectors; PyTorch raises in the backward pass.",
    ),
    (
        "op_db.cholesky*",
        "caught",
        "Its sample inputs are symmetric only as a whole, and single entries are varied here.",
    ),
    ("op_db.*batch_norm*", "caught", "Mean and deviation, which it also returns, get no gradients."),
    ("op_db.nn.functional.linear_cross_entropy*", "caught", "PyTorch's double backward of the chunked form is wrong."),
    ("op_db.logcumsumexp/0", "caught", "Zero up to 1e-16 at inputs of 10,000."),
    ("op_db.prod/0", "caught", "Underflows in float32, as the message says."),
    ("op_db.*float*", "undecidable", "Rounded to fewer digits: stairs."),
    ("op_db.*half*", "undecidable", "Rounded to fewer digits: stairs."),
    ("op_db.*safe_softmax*", "refused", NOT_FINITE),
    ("op_db.__rpow__*", "refused", NOT_FINITE),
    ("module_db.L*", "refused", NOT_FINITE),
    ("op_db.*", "refused", NO_SECOND),
)
