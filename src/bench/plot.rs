//! A run's picture, as SVG written by hand: latency by percentile above, operations a second over time below. The upper
//! panel spreads the last percent as wide as it spreads the first: each "nine" takes the same width.

use std::fmt::Write;

use super::Report;

const WIDTH: f64 = 760.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 36.0;
const PANEL: f64 = 240.0;
const GAP: f64 = 80.0;
const TOP: f64 = 50.0;
const HEIGHT: f64 = TOP + PANEL + GAP + PANEL + 50.0;

const WRITES: &str = "#c2410c";
const READS: &str = "#1d4ed8";

/// A curve of the upper panel: its name, colour and dashes, and (percentile, microseconds).
struct Curve<'a> {
    name: String,
    colour: &'static str,
    dashed: bool,
    points: &'a [(f64, f64)],
}

pub fn svg(report: &Report) -> String {
    let mut out = String::new();
    draw(&mut out, report).expect("a String takes any text");
    out
}

fn draw(out: &mut String, report: &Report) -> std::fmt::Result {
    writeln!(
        out,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">"#
    )?;
    writeln!(out, r##"<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>"##)?;
    let load = &report.load;
    let pace = load.rate.map_or("closed loop".to_owned(), |rate| format!("open loop, {rate}/s"));
    let title = format!(
        "{} × {} in flight, {pace}, {} % reads, {} bytes: {:.0} operations/s",
        load.connections, load.pipeline, load.reads_percent, load.value_bytes, report.operations_per_second
    );
    writeln!(out, r#"<text x="{LEFT}" y="20" font-size="14">{}</text>"#, escape(&title))?;
    let mut curves = Vec::new();
    for (name, colour, kind) in [("writes", WRITES, &report.writes), ("reads", READS, &report.reads)] {
        let Some(kind) = kind else { continue };
        curves.push(Curve { name: name.to_owned(), colour, dashed: false, points: &kind.curve });
        if let Some(corrected) = &kind.corrected {
            curves.push(Curve { name: format!("{name}, corrected"), colour, dashed: true, points: &corrected.curve });
        }
    }
    latencies(out, &curves)?;
    throughput(out, &report.throughput)?;
    writeln!(out, "</svg>")
}

/// Percentiles on an axis of nines, microseconds on a logarithmic one.
fn latencies(out: &mut String, curves: &[Curve<'_>]) -> std::fmt::Result {
    let nines = |percentile: f64| -(1.0 - percentile / 100.0).log10();
    let points = || curves.iter().flat_map(|curve| curve.points);
    let nines_max = points().map(|point| nines(point.0)).fold(2.0, f64::max).ceil();
    let decade = |micros: f64| micros.max(0.1).log10();
    let low = points().map(|point| decade(point.1)).fold(f64::INFINITY, f64::min).floor().min(3.0);
    let high = points().map(|point| decade(point.1)).fold(low + 1.0, f64::max).ceil();
    let x = |percentile: f64| LEFT + nines(percentile) / nines_max * (WIDTH - LEFT - RIGHT);
    let y = |micros: f64| TOP + PANEL * (1.0 - (decade(micros) - low) / (high - low));
    for exponent in low as i32..=high as i32 {
        grid(out, y(10.0_f64.powi(exponent)), &micros_text(exponent))?;
    }
    for nine in 0..=nines_max as i32 {
        let percentile = 100.0 * (1.0 - 10.0_f64.powi(-nine));
        let text = if nine == 0 { "0 %".to_owned() } else { format!("{percentile:.*} %", (nine - 2).max(0) as usize) };
        label(out, x(percentile), TOP + PANEL + 16.0, "middle", &text)?;
    }
    label(out, LEFT, TOP - 10.0, "start", "latency by percentile")?;
    for (place, curve) in curves.iter().enumerate() {
        let dashes = if curve.dashed { r#" stroke-dasharray="5 4""# } else { "" };
        line(out, curve.colour, dashes, curve.points.iter().map(|point| (x(point.0), y(point.1))))?;
        let (from, at) = (LEFT + 170.0 + 140.0 * place as f64, TOP - 14.0);
        line(out, curve.colour, dashes, [(from, at), (from + 24.0, at)].into_iter())?;
        label(out, from + 30.0, at + 4.0, "start", &curve.name)?;
    }
    Ok(())
}

fn throughput(out: &mut String, rates: &[f64]) -> std::fmt::Result {
    let top = TOP + PANEL + GAP;
    let high = round_up(rates.iter().copied().fold(1.0, f64::max));
    let y = |rate: f64| top + PANEL * (1.0 - rate / high);
    for quarter in 0..=4 {
        let rate = high * f64::from(quarter) / 4.0;
        grid(out, y(rate), &format!("{rate:.0}"))?;
    }
    let seconds = rates.len().max(1) as f64;
    let x = |second: f64| LEFT + second / seconds * (WIDTH - LEFT - RIGHT);
    label(out, LEFT, top - 10.0, "start", "operations a second")?;
    label(out, LEFT, top + PANEL + 16.0, "middle", "0 s")?;
    label(out, WIDTH - RIGHT, top + PANEL + 16.0, "end", &format!("{} s", rates.len()))?;
    // One step for each second.
    let steps = rates.iter().enumerate().flat_map(|(second, rate)| {
        let second = second as f64;
        [(x(second), y(*rate)), (x(second + 1.0), y(*rate))]
    });
    line(out, "#047857", "", steps)
}

/// The next of 1, 2, 5, 10, 20, …
fn round_up(number: f64) -> f64 {
    let decade = 10.0_f64.powf(number.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * decade);
    steps.into_iter().find(|step| *step >= number).unwrap_or(10.0 * decade)
}

fn micros_text(exponent: i32) -> String {
    match exponent {
        ..3 => format!("{} µs", 10.0_f64.powi(exponent)),
        3..6 => format!("{:.0} ms", 10.0_f64.powi(exponent - 3)),
        6.. => format!("{:.0} s", 10.0_f64.powi(exponent - 6)),
    }
}

fn grid(out: &mut String, y: f64, text: &str) -> std::fmt::Result {
    let right = WIDTH - RIGHT;
    writeln!(out, r##"<path d="M{LEFT} {y:.1}H{right}" stroke="#ddd"/>"##)?;
    label(out, LEFT - 8.0, y + 4.0, "end", text)
}

fn label(out: &mut String, x: f64, y: f64, anchor: &str, text: &str) -> std::fmt::Result {
    writeln!(out, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#, escape(text))
}

fn line(
    out: &mut String,
    colour: &str,
    attributes: &str,
    points: impl Iterator<Item = (f64, f64)>,
) -> std::fmt::Result {
    write!(out, r#"<polyline fill="none" stroke="{colour}" stroke-width="1.5"{attributes} points=""#)?;
    for (x, y) in points {
        write!(out, "{x:.1},{y:.1} ")?;
    }
    writeln!(out, r#""/>"#)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether every tag is closed in order, every attribute quoted, and no number is missing.
    fn check(svg: &str) -> Result<(), String> {
        let (mut open, mut rest) = (Vec::new(), svg);
        while let Some((text, behind)) = rest.split_once('<') {
            if text.contains(['>', '&']) && !text.contains("&lt;") {
                return Err(format!("bare text {text:?}"));
            }
            let (tag, after) = behind.split_once('>').ok_or("a tag without an end")?;
            rest = after;
            if let Some(name) = tag.strip_prefix('/') {
                if open.pop() != Some(name) {
                    return Err(format!("</{name}> closes nothing"));
                }
                continue;
            }
            if tag.matches('"').count() % 2 == 1 || tag.contains("NaN") || tag.contains("inf") {
                return Err(format!("<{tag}>"));
            }
            if !tag.ends_with('/') {
                open.push(tag.split(' ').next().unwrap_or_default());
            }
        }
        if open.is_empty() { Ok(()) } else { Err(format!("left open: {open:?}")) }
    }

    #[test]
    fn the_check_sees_what_is_not_well_formed() {
        for broken in ["<svg>", "<svg></g>", "<svg a=\"1></svg>", "<g>a & b</g>", "<g x=\"NaN\"/>"] {
            assert!(check(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn pictures_are_well_formed_with_many_points_one_or_none() {
        let full = [(0.0, 90.0), (50.0, 120.5), (99.9, 30_000.0)];
        let one = [(0.0, 0.0)];
        for points in [&full[..], &one, &[]] {
            let curve = |dashed| Curve { name: "a < b & c".to_owned(), colour: WRITES, dashed, points };
            for rates in [&[100.0, 2345.0][..], &[0.0], &[]] {
                let mut out = "<svg>".to_owned();
                latencies(&mut out, &[curve(false), curve(true)]).unwrap();
                throughput(&mut out, rates).unwrap();
                out.push_str("</svg>");
                check(&out).unwrap();
                assert!(out.contains("a &lt; b &amp; c"));
            }
        }
    }

    #[test]
    fn axes_end_on_round_numbers() {
        assert_eq!([1.0, 1.1, 2345.0, 7000.0, 10_000.0].map(round_up), [1.0, 2.0, 5000.0, 10_000.0, 10_000.0]);
        assert_eq!([-1, 2, 3, 5, 6].map(micros_text), ["0.1 µs", "100 µs", "1 ms", "100 ms", "1 s"]);
    }
}
