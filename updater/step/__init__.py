"""One training step, whatever the model: learner, gradients, precision, and what is computed once per example."""
