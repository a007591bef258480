"""The vision-language engine: one base, resident adapters by name, streamed answers. Plain Python, no Ray."""
