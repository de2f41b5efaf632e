// The derived quantities, in the order in which they are offered: name, title, and what it means.

export const METRICS = [
  ["lambda_max", "largest λ", "how strongly the output bends upwards along its most curved direction"],
  ["lambda_min", "smallest λ", "how strongly the output bends downwards along its most curved direction"],
  ["spectral_norm", "max |λ|", "the strongest bending, whatever its sign"],
  ["trace", "trace", "the sum of all eigenvalues (the Laplacian): curvature up minus curvature down"],
  ["frobenius_norm", "Frobenius norm", "the root of the sum of squared eigenvalues: all curvature, whatever its sign"],
  ["gradient_norm", "gradient norm", "how steep the output is"],
  [
    "normalized_curvature",
    "normalized curvature",
    "max |λ| / ‖gradient‖: curvature freed from the scale of the output",
  ],
  [
    "linear_radius",
    "linear radius",
    "2 ‖gradient‖ / max |λ|: the distance (L2, in input units) at which bending may equal the slope; the linear picture holds well within it",
  ],
  [
    "gauss_newton_share",
    "head share",
    "how much of the curvature the target (softmax) adds to the outputs' slopes; the rest is the network's own bending",
  ],
  ["negative_share", "negative share", "the share of Σ|λ| that is negative"],
  ["effective_rank", "effective rank", "(Σ|λ|)² / Σλ²: in how many directions the output bends"],
  ["gradient_curvature", "curvature along the gradient", "gᵀHg / gᵀg"],
  ["gradient_alignment", "gradient alignment", "|cos| between the gradient and the top eigenvector"],
  [
    "top_eigenvector_cosine",
    "drift: |cos|",
    "|cos| between the top eigenvectors here and at the measurement before; 1: not turned",
  ],
  [
    "top_subspace_overlap",
    "drift: overlap",
    "the overlap of the spaces of top eigenvectors with the measurement before; 1: not turned",
  ],
  ["asymmetry", "asymmetry", "‖H − Hᵀ‖ / ‖H‖ as computed: rounding, unless something is wrong"],
].map(([name, title, meaning]) => ({ name, title, meaning }));

export const metric = (name) => METRICS.find((each) => each.name === name) ?? METRICS[0];
