"""From checked inputs to a loss: sources, operators, autograd, choice of backend."""
