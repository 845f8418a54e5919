"""What a rollout batch says about uncertainty: gap, ROC per span, and length, as numbers and as pictures.

After the EGPO paper (arXiv 2602.22751), Fig. 3 and Table 3. Everything here looks at values: tensors on a device are
copied to the host, which waits for the device, so call it now and then, not in the inner loop. Needs the extra
``diagnostics`` (matplotlib, scikit-learn, scipy), imported only when a function wants it.
"""

from egpo_kernels.diagnostics.measures import (
    LengthCorrelation,
    Roc,
    Spread,
    UncertaintyGap,
    length_correlation,
    roc,
    roc_of_spans,
    span_uncertainty,
    uncertainty_gap,
)
from egpo_kernels.diagnostics.plots import plot_gap, plot_length, plot_roc

__all__ = [
    "LengthCorrelation",
    "Roc",
    "Spread",
    "UncertaintyGap",
    "length_correlation",
    "plot_gap",
    "plot_length",
    "plot_roc",
    "roc",
    "roc_of_spans",
    "span_uncertainty",
    "uncertainty_gap",
]
