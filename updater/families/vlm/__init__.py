"""How a vision-language model learns from an image, a question and its answer."""
