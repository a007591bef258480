"""Grafana dashboards: the JSON files in ``json/`` are the source. Edit a panel in its file, or in a copy in Grafana,
exported for sharing externally so that it asks for the data source. Tests check that panels have a description and a
unit, and that queries use metrics and labels of :mod:`core.metrics.declared`."""
