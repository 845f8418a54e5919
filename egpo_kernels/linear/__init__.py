"""From hidden states and an output layer to the loss, a chunk of rows at a time: logits are never whole."""
