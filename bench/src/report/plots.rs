//! Pictures of figures, as SVG that stands for itself.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::SegmentValue;
use plotters::prelude::*;

const WIDTH: u32 = 860;
const FONT: &str = "sans-serif";
/// Ours, in the order of lines.
const COLOURS: [RGBColor; 4] = [RGBColor(29, 78, 216), RGBColor(4, 120, 87), RGBColor(180, 83, 9), RGBColor(126, 34, 206)];
/// What it is compared with.
const GREY: RGBColor = RGBColor(120, 120, 120);

/// One figure of a picture of several.
pub(super) struct Dot {
    pub(super) label: String,
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) is_control: bool,
}

/// White, since black text is looked at on dark pages too.
fn canvas(svg: &mut String, height: u32) -> Result<DrawingArea<SVGBackend<'_>, Shift>> {
    let root = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE).map_err(drawing)?;
    Ok(root)
}

/// Figures below one another, on a logarithmic scale: a dot for the median, a line to the 99th percentile.
pub(super) fn dots(unit: &str, dots: &[Dot]) -> Result<String> {
    let (low, high) = bounds(dots.iter().flat_map(|dot| [dot.p50, dot.p99]))?;
    let mut svg = String::new();
    {
        let height = 70 + 34 * u32::try_from(dots.len())?;
        let root = canvas(&mut svg, height)?;
        let rows = (0..dots.len()).into_segmented();
        let mut chart = ChartBuilder::on(&root)
            .margin(8)
            .margin_right(90)
            .x_label_area_size(44)
            .y_label_area_size(330)
            .build_cartesian_2d((low..high).log_scale(), rows)
            .map_err(drawing)?;
        // The first one on top.
        let at = |row: usize| SegmentValue::CenterOf(dots.len() - 1 - row);
        let label = |segment: &SegmentValue<usize>| match segment {
            SegmentValue::CenterOf(row) if *row < dots.len() => dots[dots.len() - 1 - row].label.clone(),
            _ => String::new(),
        };
        chart
            .configure_mesh()
            .disable_y_mesh()
            .y_labels(dots.len() + 1)
            .y_label_formatter(&label)
            .x_label_formatter(&|value| short(*value))
            .x_desc(format!("{unit}, median and 99th percentile, logarithmic"))
            .label_style((FONT, 14))
            .draw()
            .map_err(drawing)?;
        for (row, dot) in dots.iter().enumerate() {
            let colour = if dot.is_control { GREY } else { COLOURS[0] };
            let ends = [(dot.p50, at(row)), (dot.p99, at(row))];
            chart.draw_series([PathElement::new(ends, colour.stroke_width(3))]).map_err(drawing)?;
            chart.draw_series([Circle::new((dot.p50, at(row)), 6, colour.filled())]).map_err(drawing)?;
            let value = EmptyElement::at((dot.p99, at(row))) + Text::new(short(dot.p50), (10, -7), (FONT, 14).into_font());
            chart.draw_series([value]).map_err(drawing)?;
        }
        root.present().map_err(drawing)?;
    }
    Ok(svg)
}

/// One line of a picture of several.
pub(super) struct Line {
    pub(super) name: String,
    /// From the left.
    pub(super) points: Vec<(f64, f64)>,
    pub(super) is_control: bool,
}

/// Lines over one another, on logarithmic scales: on these, what grows alike is parallel.
pub(super) fn lines((x, y): (&str, &str), lines: &[Line]) -> Result<String> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let (left, right) = bounds(points().map(|(x, _)| *x))?;
    let (low, high) = bounds(points().map(|(_, y)| *y))?;
    let mut svg = String::new();
    {
        let root = canvas(&mut svg, 420)?;
        let mut chart = ChartBuilder::on(&root)
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(80)
            .build_cartesian_2d((left..right).log_scale(), (low..high).log_scale())
            .map_err(drawing)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_label_formatter(&|value| short(*value))
            .y_label_formatter(&|value| short(*value))
            .x_desc(x)
            .y_desc(y)
            .label_style((FONT, 14))
            .draw()
            .map_err(drawing)?;
        let mut colours = COLOURS.into_iter().cycle();
        for line in lines {
            let colour = if line.is_control { GREY } else { colours.next().expect("they never end") };
            let drawn = chart.draw_series(LineSeries::new(line.points.clone(), colour.stroke_width(2))).map_err(drawing)?;
            drawn.label(&line.name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3)));
            chart.draw_series(line.points.iter().map(|point| Circle::new(*point, 4, colour.filled()))).map_err(drawing)?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(GREY.mix(0.4))
            .label_font((FONT, 14))
            .draw()
            .map_err(drawing)?;
        root.present().map_err(drawing)?;
    }
    Ok(svg)
}

/// What holds all of them, with a little room. Logarithms have no zero.
fn bounds(values: impl Iterator<Item = f64>) -> Result<(f64, f64)> {
    let mut bounds = (f64::INFINITY, 0.0_f64);
    for value in values.filter(|value| *value > 0.0) {
        bounds = (bounds.0.min(value), bounds.1.max(value));
    }
    if bounds.0.is_finite() { Ok((bounds.0 / 1.6, bounds.1 * 1.6)) } else { Err(anyhow!("there is nothing to draw")) }
}

/// Three digits at most.
fn short(value: f64) -> String {
    match value {
        10_000.0.. => format!("{:.0}k", value / 1000.0),
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}").trim_end_matches(".0").to_owned(),
        _ => format!("{value:.2}").trim_end_matches('0').trim_end_matches('.').to_owned(),
    }
}

fn drawing(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("drawing: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_say_what_they_show() {
        let all: Vec<Dot> = [("floor <&>", 300.0, true), ("fork", 650.0, false)]
            .map(|(label, p50, is_control)| Dot { label: label.to_owned(), p50, p99: p50 * 2.0, is_control })
            .into();
        let svg = dots("us", &all).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("floor &lt;&amp;&gt;") && svg.contains("650"), "{svg}");
        let tree = Line { name: "tree".to_owned(), points: vec![(1.0, 2.0), (8.0, 3.0)], is_control: false };
        let svg = lines(("hosts", "s"), &[tree]).unwrap();
        assert!(svg.contains("tree") && svg.contains("hosts"), "{svg}");
        assert!(lines(("x", "y"), &[]).is_err() && dots("us", &[]).is_err());
    }

    #[test]
    fn numbers_on_axes_are_short() {
        assert_eq!([0.25, 7.0, 12.5, 300.0, 4_500.0, 12_000.0].map(short), ["0.25", "7", "12.5", "300", "4500", "12k"]);
    }
}
