"""The pages of the documentation site that are made from the code, and how the site is put together."""
