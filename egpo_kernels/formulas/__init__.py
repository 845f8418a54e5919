"""The mathematics in torch: surrogates, advantages, reductions, metrics."""
