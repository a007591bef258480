"""The methods of the shipped recipes, and the protocols for methods of other packages."""
