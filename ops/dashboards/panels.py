"""The few kinds of panels that the dashboards are made of, so that all of them look and read alike.

A panel says in its description what it shows and what to do about a bad value. Numbers that have a good and a bad range
are coloured by thresholds, all others are not coloured at all: colour means something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    timeseries,
)
from grafana_foundation_sdk.builders import dashboard as make
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heat_kinds
from grafana_foundation_sdk.models import prometheus as query_kinds

GREEN, ORANGE, RED, BLUE, GREY = "green", "orange", "red", "blue", "text"
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
Query = tuple[str, str]
"""Expression and legend."""
Step = tuple[float | None, str]
"""A value (None: from below), and the colour from there on."""
Panel = stat.Panel | timeseries.Panel | bargauge.Panel | statetimeline.Panel | heatmap.Panel
Made = TypeVar("Made", stat.Panel, timeseries.Panel, bargauge.Panel, statetimeline.Panel)


def dashboard(name: str, title: str, description: str) -> make.Dashboard:
    """An empty dashboard: variable for the data source, links to the others, a mark at each release."""
    releases = (
        make.AnnotationQuery()
        .name("Releases")
        .datasource(SOURCE)
        .enable(True)
        .icon_color(BLUE)
        .expr('max(changes(ratchet_release_live{part="controller"}[1m])) > 0')
    )
    others = (
        make.DashboardLink("Ratchet")
        .type(model.DashboardLinkType.DASHBOARDS)
        .tags(["ratchet"])
        .include_vars(True)
        .keep_time(True)
    )
    return (
        make.Dashboard(f"Ratchet / {title}")
        .uid(f"ratchet-{name}")
        .description(description)
        .tags(["ratchet"])
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .refresh("15s")
        .time("now-1h", "now")
        .with_variable(make.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .annotation(releases)
        .link(others)
        .readonly()
    )


def row(board: make.Dashboard, title: str, *panels: Panel) -> None:
    """Put panels under a heading, side by side; Grafana's grid has 24 columns."""
    board.with_row(make.Row(title))
    for panel in panels:
        board.with_panel(panel)


def number(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    steps: Sequence[Step] = (),
    words: Mapping[str, tuple[str, str]] | None = None,
    nothing: str = "no data",
    decimals: int | None = None,
    width: int = 4,
    names: bool = False,
    trend: bool = True,
) -> stat.Panel:
    """The newest value, large, over a trace of where it came from.

    Args:
        steps: thresholds; without them the number has no colour.
        words: what to show instead of a value, and its colour.
        nothing: what to show while there is no value.
        names: show the legend instead of the value.
    """
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .no_value(nothing)
        .height(4)
        .span(width)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .graph_mode(kinds.BigValueGraphMode.AREA if trend and not names else kinds.BigValueGraphMode.NONE)
        .color_mode(kinds.BigValueColorMode.VALUE if steps or words else kinds.BigValueColorMode.NONE)
        .thresholds(_thresholds(steps or [(None, GREY)]))
        .color_scheme(make.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .text_mode(kinds.BigValueTextMode.NAME if names else _text_mode(queries))
    )
    if words:
        panel.mappings([_words(words)])
    if decimals is not None:
        panel.decimals(decimals)
    return _with(panel, queries, instant=not trend or names)


def lines(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    steps: Sequence[Step] = (),
    width: int = 8,
    height: int = 8,
    stacked: bool = False,
    stairs: bool = False,
    least: float | None = None,
    most: float | None = None,
) -> timeseries.Panel:
    """Values over time.

    Args:
        steps: thresholds, drawn as lines.
        stacked: areas that add up.
        stairs: values that stay until they change.
        least, most: what the axis shows at least.
    """
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .height(height)
        .span(width)
        .line_width(1)
        .fill_opacity(30 if stacked else 8)
        .show_points(kinds.VisibilityMode.NEVER)
        .color_scheme(make.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC))
        .span_nulls(False)
        .line_interpolation(kinds.LineInterpolation.STEP_AFTER if stairs else kinds.LineInterpolation.LINEAR)
        .tooltip(common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.DESCENDING))
        .legend(
            common.VizLegendOptions()
            .display_mode(kinds.LegendDisplayMode.LIST)
            .placement(kinds.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL))
    if steps:
        panel.thresholds(_thresholds(steps))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(kinds.GraphThresholdsStyleMode.DASHED))
    if least is not None:
        panel.axis_soft_min(least)
    if most is not None:
        panel.axis_soft_max(most)
    return _with(panel, queries)


def bars(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    steps: Sequence[Step] = (),
    least: float = 0,
    most: float | None = None,
    width: int = 12,
    height: int = 9,
) -> bargauge.Panel:
    """One bar for each series, at its newest value."""
    panel = (
        bargauge.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .min(least)
        .height(height)
        .span(width)
        .orientation(kinds.VizOrientation.HORIZONTAL)
        .display_mode(kinds.BarGaugeDisplayMode.BASIC)
        .value_mode(kinds.BarGaugeValueMode.COLOR if steps else kinds.BarGaugeValueMode.TEXT)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .thresholds(_thresholds(steps or [(None, BLUE)]))
        .color_scheme(make.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
    )
    if most is not None:
        panel.max(most)
    return _with(panel, queries, instant=True)


def states(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    words: Mapping[str, tuple[str, str]],
    width: int = 12,
    height: int = 8,
) -> statetimeline.Panel:
    """Bands of states over time. ``words``: text and colour of each value."""
    panel = (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .height(height)
        .span(width)
        .merge_values(True)
        .show_value(kinds.VisibilityMode.AUTO)
        .mappings([_words(words)])
        .thresholds(_thresholds([(None, GREY)]))
        .color_scheme(make.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
    )
    return _with(panel, queries)


def heat(title: str, description: str, unit: str, expr: str, *, width: int = 12, height: int = 8) -> heatmap.Panel:
    """A histogram over time. ``expr`` gives increases by ``le``."""
    panel = (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .height(height)
        .span(width)
        .calculate(False)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .color(heatmap.HeatmapColorOptions().mode(heat_kinds.HeatmapColorMode.SCHEME).scheme("Blues").steps(32))
    )
    target = _target(expr, "{{le}}", "A").format(query_kinds.PromQueryFormat.HEATMAP)
    return panel.with_target(target)


def _with(panel: Made, queries: Sequence[Query], instant: bool = False) -> Made:
    for letter, (expr, legend) in zip("ABCDEFGH", queries, strict=False):
        target = _target(expr, legend, letter)
        panel.with_target(target.instant() if instant else target.range())
    return panel


def _target(expr: str, legend: str, letter: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(letter).datasource(SOURCE)


def _text_mode(queries: Sequence[Query]) -> kinds.BigValueTextMode:
    several = len(queries) > 1 or any("{{" in legend for _, legend in queries)
    return kinds.BigValueTextMode.VALUE_AND_NAME if several else kinds.BigValueTextMode.VALUE


def _thresholds(steps: Sequence[Step]) -> make.ThresholdsConfig:
    return (
        make.ThresholdsConfig()
        .mode(model.ThresholdsMode.ABSOLUTE)
        .steps([model.Threshold(value, colour) for value, colour in steps])
    )


def _words(words: Mapping[str, tuple[str, str]]) -> model.ValueMap:
    return model.ValueMap(
        {
            value: model.ValueMappingResult(text=text, color=colour, index=index)
            for index, (value, (text, colour)) in enumerate(words.items())
        }
    )
