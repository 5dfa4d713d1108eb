"""From recorded numbers to tables and plots. Knows no models and no pipelines."""

from trimfit.report.plots import Curve as Curve
from trimfit.report.plots import can_plot as can_plot
from trimfit.report.plots import plot_curves as plot_curves
from trimfit.report.plots import plot_panels as plot_panels
from trimfit.report.spread import Spread as Spread
from trimfit.report.table import markdown as markdown
