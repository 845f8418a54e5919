"""What acts on a rollout batch before the loss: rewards, sampling, spans, targets."""
