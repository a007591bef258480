"""One training step for any model: learner, gradients, precision, and what is computed once per example."""
