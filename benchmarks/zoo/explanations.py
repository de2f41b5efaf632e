"""Why a case did not come out right: pattern of the case, verdicts, explanation; the first that fits counts."""

NO_SECOND = "PyTorch has no (second) derivative of this operation; the error names it."
NOT_FINITE = "The sample input itself holds infinite or undefined numbers, or the values are."
NOT_OF_VALUES = (
    "What autograd gives is deliberately not the derivative of the values: gradients are dropped, scaled or "
    "straight through."
)

SYMMETRIC = (
    "PyTorch reads one triangle of the matrix, and shares the gradient between both, as for symmetric matrices; here "
    "single entries are varied."
)
RELU = "Hundreds of ReLUs: kinks within the steps."
STAIRS = "Stairs, closer together than the shortest step."

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
    ("op_db.igamma*", "refused", "PyTorch has no derivative with respect to the first argument."),
    ("op_db.resize_*", "refused", "PyTorch resizes no tensor that gradients are taken of."),
    (
        "op_db.linalg.eig/*",
        "refused",
        "Depends on the phase of complex eigenvectors; PyTorch raises in the backward pass.",
    ),
    ("op_db.floor_divide*", "refused", "PyTorch has no derivative of it, not even zero."),
    ("op_db.heaviside*", "refused", "PyTorch has no derivative of it, not even zero."),
    (
        "op_db.linalg.norm.subgradients_at_zero*",
        "refused",
        "At zero, where a norm has a kink and its second derivative is infinite.",
    ),
    ("op_db.linalg.norm.subgradients_at_zero*", "undecidable", "A kink exactly at the sample."),
    (
        "op_db._batch_norm_with_update/1",
        "wrong",
        "In float32 only. Mean and deviation, which it also returns, get no gradients: the gradient is off by 3.8 %, "
        "but by only 0.3 % in the direction that the check looks along, within its 1 % for float32.",
    ),
    ("op_db.as_strided_scatter*", "caught", "Autograd's gradient is wrong where nothing is scattered: 0.66, not 0."),
    (
        "op_db.nn.functional.max_unpool*",
        "caught",
        "Indices repeat: one of several values is written, all get gradients.",
    ),
    ("op_db.nn.functional.embedding*", "caught", NOT_OF_VALUES),
    ("op_db.native_layer_norm*", "caught", "Mean and deviation, which it also returns, get no gradients."),
    ("op_db.*batch_norm*", "caught", "Mean and deviation, which it also returns, get no gradients."),
    ("op_db.normal*", "caught", "The random number scales with the input; autograd says zero."),
    (
        "op_db.nn.functional.scaled_dot_product_attention/0",
        "alarmed caught",
        "Saturated: gradient and Hessian are 1e-11 of the values, below what differences of values can confirm, and "
        "rounding has left the Hessian asymmetric by 1e-5 (by 0.8 in float32).",
    ),
    ("op_db.nn.functional.group_norm/20", "alarmed caught", "Lost in the rounding of float32, as the message says."),
    ("op_db.logcumsumexp/0", "alarmed caught", "Zero up to 1e-16 at inputs of 10,000."),
    (
        "op_db.logcumsumexp/1",
        "undecidable",
        "Entries of 10,000 beside others of 1: steps relative to the input are too long for these.",
    ),
    ("op_db.round*", "undecidable", STAIRS),
    ("op_db.*float*", "undecidable", "Rounded to fewer digits: stairs."),
    ("op_db.*half*", "undecidable", "Rounded to fewer digits: stairs."),
    ("op_db.frexp*", "undecidable", "A jump next to a sample."),
    ("op_db.__rmod__*", "undecidable", "A jump next to a sample."),
    ("op_db.digamma*", "undecidable", "A pole at -2, next to a sample."),
    ("op_db.lgamma*", "undecidable", "A pole at -2, next to a sample."),
    ("op_db.*sort/0", "undecidable", "Values closer together than the shortest step: they change places."),
    ("module_db.*MaxPool*", "undecidable", "Values of a window closer together than a step: a kink next to a sample."),
    ("op_db.special.*", "caught", "PyTorch has no derivative and raises nothing: autograd says zero."),
    ("op_db.special.zeta*", "refused", NO_SECOND),
    ("op_db.special.*", "refused", NOT_FINITE),
    ("op_db.*cholesky*", "caught", SYMMETRIC),
    ("op_db.linalg.eigh*", "caught", SYMMETRIC),
    ("op_db.linalg.eigvalsh*", "caught", SYMMETRIC),
    ("op_db.linalg.pinv.hermitian*", "caught", SYMMETRIC),
    ("op_db.nn.functional.linear_cross_entropy*", "caught", "PyTorch's double backward of the chunked form is wrong."),
    ("op_db.prod/0", "caught", "Underflows in float32, as the message says."),
    ("op_db.*safe_softmax*", "refused", NOT_FINITE),
    ("op_db.masked.log_softmax*", "refused", NOT_FINITE),
    ("op_db.__rpow__*", "refused", NOT_FINITE),
    ("module_db.L*", "refused", NOT_FINITE),
    ("op_db.*", "refused", NO_SECOND),
    (
        "transformers.led/*",
        "refused",
        "Its masks overflow in float64, and autograd's gradient is not finite; the message says so.",
    ),
    (
        "transformers.mobilenet_v1/*",
        "alarmed",
        "Random weights leave a gradient of 1e-30, whose norm underflows in float32.",
    ),
    (
        "transformers.sam_*vision_model/*",
        "alarmed",
        "Random weights leave a Hessian of 1e-47, which underflows in float32, as the message says.",
    ),
    (
        "transformers.mobilevit/*",
        "caught",
        "Random weights leave outputs of 1e-41, of which float32 holds a few digits; in float64 they are right.",
    ),
    ("transformers.vit_mae/*", "caught", "Patches are masked at random."),
    ("transformers.yoso/*", "caught", "Its backward pass is an approximation of its own, not the derivative."),
    (
        "transformers.levit/*",
        "crashed",
        "It keeps a tensor of the last evaluation, in float64, which its forward cannot combine with float32.",
    ),
    ("transformers.*", "refused", NO_SECOND),
    ("transformers.llama4/*", "undecidable", "Sends tokens to other experts within the steps: a jump."),
    ("transformers.regnet/*", "undecidable", RELU),
    ("transformers.swiftformer/*", "undecidable", "ReLUs in the patch embedding: kinks within the steps."),
    ("transformers.openai_privacy_filter/*", "undecidable", "A router of tokens to experts: jumps within the steps."),
    ("transformers.switch_transformers/*", "undecidable", "ReLUs, and a router of tokens: kinks and jumps."),
    ("transformers.*moe*/*", "undecidable", "ReLU, or tokens sent to other experts: kinks or jumps within the steps."),
    (
        "transformers.muse_glimmer_text/*",
        "undecidable",
        "Computes partly in float32, and bends so sharply that no step is within 1 %.",
    ),
    *(
        (f"transformers.{name}/*", "undecidable", RELU)
        for name in ("ctrl", "longt5", "m2m_100", "mobilebert", "t5", "textnet")
    ),
)
