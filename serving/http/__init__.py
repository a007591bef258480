"""The HTTP surface: routes, schemas, authentication, limits, image intake. No Ray here but in the calls it is given."""
